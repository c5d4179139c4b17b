"Supervised fine-tuning: the loss sees the completion's tokens and nothing else; Muon against torch's."

import copy
import pickle
from dataclasses import fields
from functools import partial

import pytest
import torch
from PIL import Image

from vlm_reward.core.rows import make_row
from vlm_reward.data.behaviours import demonstrate
from vlm_reward.policy.families import load_policy
from vlm_reward.policy.sampling import encode_prompts
from vlm_reward.train import sft
from vlm_reward.train.muon import Muon, orthogonalise
from vlm_reward.train.sft import (
    IGNORED,
    SFTSettings,
    completion_ids,
    encode_examples,
    train_sft,
    with_labels,
)
from vlm_reward.worlds.scenes import scene_rng, scene_rows


@pytest.fixture(scope="module")
def pocket():
    return load_policy("pocket")


def examples(n=5):
    return [
        (row, demonstrate("grounded", row, scene_rng(i))) for i, row in enumerate(scene_rows("relation", n, seed=40))
    ]


@pytest.mark.parametrize(
    "gpu, device, processes, cpu",
    [(False, "cpu", 1, True), (True, "cpu", 1, True), (True, "cuda", 1, False), (True, "cpu", 2, False)],
)
def test_training_is_where_the_policy_is(monkeypatch, gpu, device, processes, cpu):
    monkeypatch.setattr(sft, "TrainingArguments", dict)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    assert sft.training_arguments(SFTSettings(), "out", device)["use_cpu"] == cpu


def test_labels_are_the_completion_between_header_and_end(pocket):
    "Against the plain text: find the last assistant header, tokenise what follows."
    tokenizer = pocket[1].tokenizer
    batch = encode_examples(pocket[1], examples())
    for ids, labels, (_, completion) in zip(batch["input_ids"], batch["labels"], examples(), strict=True):
        text = tokenizer.decode(ids[: (labels != IGNORED).nonzero()[0]])
        assert text.endswith("<|im_start|>assistant\n")
        assert tokenizer.decode(labels[labels != IGNORED]) == completion + "<|im_end|>"
        assert (ids[labels != IGNORED] == labels[labels != IGNORED]).all()


def test_pieces_are_put_together_by_hand(pocket):
    "Against lists: what is given has no label, what is learned has its own, padding has neither."
    processor, rows = pocket[1], [row for row, _ in examples(3)]
    prompts = encode_prompts(processor, rows)
    pieces = [[([7, 8], False), ([9], True), ([10, 11], False)], [([12, 13, 14], True)], [([15], False), ([], True)]]
    batch, width = with_labels(processor, prompts, pieces), prompts["input_ids"].shape[1]
    pad = processor.tokenizer.pad_token_id
    assert torch.equal(batch["input_ids"][:, :width], prompts["input_ids"])
    assert batch["input_ids"][:, width:].tolist() == [[7, 8, 9, 10, 11], [12, 13, 14, pad, pad], [15, *[pad] * 4]]
    assert batch["attention_mask"][:, width:].tolist() == [[1] * 5, [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]
    assert (batch["labels"][:, :width] == IGNORED).all()
    no = IGNORED
    assert batch["labels"][:, width:].tolist() == [[no, no, 9, no, no], [12, 13, 14, no, no], [no] * 5]
    assert torch.equal(batch["pixel_values"], prompts["pixel_values"])


def test_one_learned_piece_is_a_completion(pocket):
    processor, pairs = pocket[1], examples(3)
    pieces = [[(completion_ids(processor, text), True)] for _, text in pairs]
    batch = with_labels(processor, encode_prompts(processor, [row for row, _ in pairs]), pieces)
    plain = encode_examples(processor, pairs)
    assert batch.keys() == plain.keys() and all(torch.equal(batch[name], plain[name]) for name in plain)


def shouted(processor, examples):
    "Another encoder: every completion in capitals."
    return encode_examples(processor, [(row, text.upper()) for row, text in examples])


@pytest.mark.parametrize("loaders", [0, 1])
def test_another_encoder_makes_the_batches(pocket, loaders):
    "Also in processes of their own, which get it pickled."
    settings = SFTSettings(steps=1, batch_size=4, warmup=0, shuffle=False, loaders=loaders)
    encode = pickle.loads(pickle.dumps(partial(shouted, pocket[1])))
    mine, theirs = copy.deepcopy(pocket[0]), copy.deepcopy(pocket[0])
    train_sft(mine, pocket[1], examples(4), settings, encode=encode)
    train_sft(theirs, pocket[1], [(row, text.upper()) for row, text in examples(4)], settings)
    assert all(torch.equal(p, q) for p, q in zip(mine.parameters(), theirs.parameters(), strict=True))
    assert any(not torch.equal(p, q) for p, q in zip(mine.parameters(), pocket[0].parameters(), strict=True))


def test_loss_does_not_depend_on_the_prompt_labels_or_padding(pocket):
    model, processor = pocket
    with torch.no_grad():
        single = [model(**encode_examples(processor, [e])) for e in examples()]
        together = model(**encode_examples(processor, examples()))
    counts = [(encode_examples(processor, [e])["labels"] != IGNORED).sum() for e in examples()]
    mean = sum(out.loss * n for out, n in zip(single, counts, strict=True)) / sum(counts)
    assert abs(mean - together.loss) < 1e-4


def test_changing_the_picture_changes_the_loss(pocket):
    model, processor = pocket
    (row, completion), *_ = examples()
    blank = {**row, "images": [Image.new("RGB", (64, 64), "white")]}
    with torch.no_grad():
        seen, blind = (model(**encode_examples(processor, [(r, completion)])).loss for r in (row, blank))
    assert blind > seen + 0.1


def test_rows_without_a_picture_can_be_learnt(pocket):
    row = make_row(id="0", task="t", question="Say yes", images=[], solution="yes")
    batch = encode_examples(pocket[1], [(row, "yes")])
    assert "pixel_values" not in batch
    assert torch.isfinite(pocket[0](**batch).loss)


def test_first_step_follows_the_gradient_of_the_batch(pocket):
    "One step of plain AdamW by hand gives the trainer's weights."
    processor, mine, theirs = pocket[1], copy.deepcopy(pocket[0]), copy.deepcopy(pocket[0])
    settings = SFTSettings(steps=1, batch_size=4, lr=1e-3, warmup=0, decay="constant", shuffle=False)
    train_sft(theirs, processor, examples(4), settings)
    mine.train()
    optimizer = torch.optim.AdamW(mine.parameters(), lr=1e-3, weight_decay=0.01, betas=(0.9, 0.98))
    mine(**encode_examples(processor, examples(4))).loss.backward()
    torch.nn.utils.clip_grad_norm_(mine.parameters(), 1.0)
    optimizer.step()
    for (name, p), q in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-5), name


def test_orthogonalise_against_svd():
    torch.manual_seed(0)
    for shape in [(2, 8, 8), (3, 5, 20), (1, 30, 7)]:
        matrices = torch.randn(shape)
        values = torch.linalg.svdvals(orthogonalise(matrices, steps=8))
        assert values.min() > 0.6 and values.max() < 1.25


def test_muon_state_survives_a_save():
    torch.manual_seed(0)
    net = torch.nn.Linear(6, 6)
    runs = []
    for resume in (False, True):
        model, data = copy.deepcopy(net), torch.Generator().manual_seed(1)
        optimizer = Muon(model, lr=0.01)
        for step in range(4):
            if resume and step == 2:
                saved, optimizer = optimizer.state_dict(), Muon(model, lr=0.01)
                optimizer.load_state_dict(saved)
            optimizer.zero_grad()
            model(torch.randn(16, 6, generator=data)).square().mean().backward()
            optimizer.step()
        runs.append([p.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"batch_size": 0}])
def test_settings_without_a_step_are_refused(pocket, wrong):
    with pytest.raises(ValueError, match="want steps and batch_size"):
        train_sft(pocket[0], pocket[1], examples(1), SFTSettings(**wrong))


def test_further_fields_go_to_transformers_and_unknown_ones_are_refused(pocket):
    further = {"gradient_accumulation_steps": 2, "logging_steps": 3, "report_to": "tensorboard"}
    told = sft.training_arguments(SFTSettings(batch_size=8, trainer=further), "unused")
    assert (told.per_device_train_batch_size, told.gradient_accumulation_steps, told.save_strategy) == (8, 2, "no")
    assert (told.logging_steps, told.report_to) == (3, ["tensorboard"])
    with pytest.raises(ValueError, match=r"trainer\.bf61: TrainingArguments has no such field; did you mean bf16"):
        train_sft(*pocket, examples(1), SFTSettings(steps=1, trainer={"bf61": True}))
    with pytest.raises(ValueError, match=r"trainer\.zzz: .* field; transformers' documentation lists them$"):
        train_sft(*pocket, examples(1), SFTSettings(steps=1, trainer={"zzz": True}))


def refusal(pocket, **trainer):
    with pytest.raises(ValueError) as error:
        train_sft(*pocket, examples(1), SFTSettings(steps=1, trainer=trainer))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "owner"),
    [
        ("max_steps", 7, "steps"),
        ("num_train_epochs", 3, "steps"),
        ("per_device_train_batch_size", 2, "batch_size"),
        ("learning_rate", 0.1, "lr"),
        ("warmup_steps", 3, "warmup"),
        ("lr_scheduler_type", "cosine", "decay"),
        ("weight_decay", 0.5, "weight_decay"),  # the optimizer is ours, and would not hear of it
        ("adam_beta2", 0.5, "beta2"),
        ("adam_beta1", 0.5, "optimizer"),
        ("optim", "sgd", "optimizer"),
        ("max_grad_norm", 9.0, "max_grad_norm"),
        ("dataloader_num_workers", 1, "loaders"),
        ("train_sampling_strategy", "sequential", "shuffle"),
        ("seed", 0, "seed"),
        ("data_seed", 5, "seed"),
    ],
)
def test_a_field_that_a_setting_owns_is_refused(pocket, name, value, owner):
    "Else it would win over the setting, or be ignored."
    told = refusal(pocket, **{name: value})
    assert told == f"trainer.{name}: {value!r} belongs to {owner}; take it out of trainer"


def test_whatever_is_handed_to_transformers_is_owned_and_exists(monkeypatch):
    "The table cannot drift from the arguments: it is what they are made of."
    handed, free = {}, {"logging_steps", "report_to", "disable_tqdm"}
    ours, known = sft.owned_fields(SFTSettings()), {f.name for f in fields(sft.TrainingArguments)}
    with monkeypatch.context() as patch:
        patch.setattr(sft, "TrainingArguments", lambda **words: handed.update(words))
        sft.training_arguments(SFTSettings(), "unused")
    assert set(handed) - free == set(ours) and free < set(handed)
    assert (set(ours) | set(sft.ALIASES) | set(sft.USELESS)) <= known
    assert not set(ours) & set(sft.ALIASES) and not (set(ours) | set(sft.ALIASES)) & set(sft.USELESS)
    names = {f.name for f in fields(SFTSettings)}
    for owner in {owner for owner, _ in ours.values()} | set(sft.ALIASES.values()):
        assert owner.startswith("the ") or owner in names


def test_what_is_of_no_use_is_refused_with_the_reason(pocket):
    evaluated = "of no use: no rows are evaluated while it trains"
    assert evaluated in refusal(pocket, eval_strategy="steps")
    assert evaluated in refusal(pocket, load_best_model_at_end=True)
    assert "writes no checkpoints" in refusal(pocket, save_steps=5)
    assert "does not shift the labels" in refusal(pocket, label_smoothing_factor=0.1)


def test_transformers_smooths_labels_without_a_shift_for_models_with_pictures(pocket):
    "Which is why it is refused: if this fails, it need no longer be."
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert pocket[0]._get_name() not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
