"Adapters off is the base, to the last bit; what is trained is what was asked; a folder tells how its policy reasons."

import json
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from test_policy_families import Wrapped
from test_policy_packing import SPECIMENS, fresh, make_rows, make_texts, refusal
from trl.trainer.utils import add_fused_lm_head

from vlm_reward.lacot.pair import (
    Reasoning,
    adapter_parameters,
    add_lora,
    answering,
    check_trainable,
    frozen_copy,
    has_adapters,
    load_answerer,
    read_reasoning,
    write_reasoning,
)
from vlm_reward.policy.branches import Branch
from vlm_reward.policy.families import MERGER_NAMES, freeze_vision_tower, load_policy, vision_tower
from vlm_reward.policy.packing import branch_logprobs
from vlm_reward.policy.sampling import encode_prompts

EACH = pytest.mark.parametrize("family", SPECIMENS)
ROWS = make_rows([(1, 2), (0, 3)])
TEXTS = [[Branch(text) for text in some] for some in make_texts([(6, 2), (3,)])]


def scores(model, processor):
    "Log-probabilities of some texts."
    with torch.no_grad():
        scored = branch_logprobs(model, encode_prompts(processor, ROWS), TEXTS)
    return torch.cat([score.logprobs for some in scored for score in some])


def moved(adapted, std=0.3):
    "Adapters that do something."
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    return adapted


@EACH
@pytest.mark.parametrize("wrapped", [False, True])
def test_adapters_off_is_the_base_and_on_is_not(family, wrapped):
    model, processor = fresh(family)
    base = scores(model, processor)
    adapted = add_lora(model, 4)
    assert torch.equal(scores(adapted, processor), base)  # B is 0 at the start
    moved(adapted)
    policy = Wrapped(adapted) if wrapped else adapted
    on = scores(policy, processor)
    with answering(policy) as pi:
        assert torch.equal(scores(pi, processor), base)
    assert torch.equal(scores(policy, processor), on) and (on - base).abs().max() > 1e-2


def test_an_error_inside_switches_the_adapters_on_again():
    model, processor = fresh("llava")
    adapted = moved(add_lora(model, 4))
    on = scores(adapted, processor)
    with pytest.raises(KeyError), answering(adapted):
        raise KeyError
    assert torch.equal(scores(adapted, processor), on)


@pytest.mark.parametrize("trainable", [False, True])
def test_answering_leaves_what_is_trained_as_it_was(trainable):
    "PEFT makes adapters trainable when it switches them on again."
    adapted = add_lora(fresh("llava")[0], 4)
    for parameter in adapted.parameters():
        parameter.requires_grad_(parameter.requires_grad and trainable)
    before = [parameter.requires_grad for parameter in adapted.parameters()]
    assert any(before) == trainable
    with answering(adapted):
        pass
    assert [parameter.requires_grad for parameter in adapted.parameters()] == before


def test_gradients_flow_through_the_sampler_alone():
    model, processor = fresh("qwen2_5_vl")
    adapted = moved(add_lora(model, 4))
    inputs = encode_prompts(processor, ROWS)
    with answering(adapted) as pi, torch.no_grad():
        reward = branch_logprobs(pi, inputs, TEXTS)[0][0].logprobs
    logprobs = branch_logprobs(adapted, inputs, TEXTS)[0][0].logprobs
    assert not reward.requires_grad and logprobs.requires_grad
    ((logprobs - reward) ** 2).sum().backward()
    moving = {id(p) for p in adapted.parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert moving and moving <= adapter_parameters(adapted)


def test_the_answerer_of_a_model_that_learns_does_not_learn():
    model, processor = fresh("llava")
    adapted = add_lora(model, 4)
    before = scores(adapted, processor)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        loss = -branch_logprobs(adapted, encode_prompts(processor, ROWS), TEXTS)[0][0].logprobs.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with answering(adapted) as pi:
        assert torch.equal(scores(pi, processor), before)
    assert not torch.equal(scores(adapted, processor), before)


@EACH
def test_a_frozen_copy_stays_when_the_model_moves(family):
    model, processor = fresh(family)
    before = scores(model, processor)  # which also patches the model's forward
    model.train()
    frozen = frozen_copy(model)
    assert model.training and not frozen.training and not any(p.requires_grad for p in frozen.parameters())
    assert all(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    with answering(model, frozen) as pi:
        assert pi is frozen and torch.equal(scores(pi, processor), before)
    assert not torch.equal(scores(model.eval(), processor), before)


def test_a_frozen_copy_of_a_model_that_trl_has_patched():
    "TRL's head is a function that remembers its model: a copy must not go on asking the original."
    model, processor = fresh("llava")
    before = scores(model, processor)
    add_fused_lm_head(model, 1.0)
    patched = vars(model)["forward"]
    frozen = frozen_copy(model)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
        plain = frozen(**encode_prompts(processor, ROWS)).logits
    assert torch.equal(scores(frozen, processor), before)
    assert vars(model)["forward"] is patched and plain.shape[-1] == model.config.text_config.vocab_size


def test_a_frozen_copy_with_adapters_keeps_them_on():
    model, processor = fresh("llava")
    adapted = moved(add_lora(model, 4))
    on = scores(adapted, processor)
    frozen = frozen_copy(adapted)
    with torch.no_grad():
        moved(adapted, 0.7)
    with answering(adapted, frozen) as pi:
        assert torch.equal(scores(pi, processor), on)
    assert not torch.equal(scores(adapted, processor), on)


@EACH
def test_what_is_trained_is_what_was_asked(family):
    model, _ = fresh(family)
    everything = [name for name, _ in model.named_parameters()]
    assert check_trainable(model, freeze_vision=False) == everything
    refusal("trainable and should be frozen: call freeze_vision_tower", check_trainable, model)
    freeze_vision_tower(model)
    tower = {id(p) for p in vision_tower(model).parameters()}
    rest = [
        name
        for name, p in model.named_parameters()
        if id(p) not in tower or any(part in MERGER_NAMES for part in name.split("."))
    ]
    assert check_trainable(model) == rest
    refusal("frozen and should be trainable", check_trainable, model, freeze_vision=False)
    adapted = add_lora(model, 4)
    names = check_trainable(adapted)
    assert [f"module.{name}" for name in names] == check_trainable(Wrapped(adapted))
    assert all("lora_" in name for name in names)
    assert len(names) == 2 * 2 * 7  # A and B, two layers, seven matrices
    assert not any("visual" in name or "vision" in name for name in names)


@EACH
def test_a_flag_that_froze_nothing_is_found(family):
    model, _ = fresh(family)
    adapted = add_lora(model, 4)
    stray = next(p for name, p in adapted.named_parameters() if "layernorm" in name)
    stray.requires_grad_(True)
    refusal("layernorm.* and 0 more are trainable and should be frozen", check_trainable, adapted)
    stray.requires_grad_(False)
    for parameter in adapted.parameters():
        parameter.requires_grad_(False)
    refusal("and 27 more are frozen and should be trainable", check_trainable, adapted)


def test_an_adapter_that_is_not_active_is_not_to_be_trained():
    adapted = add_lora(fresh("llava")[0], 4)
    adapted.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    assert all(".default." in name for name in check_trainable(adapted))
    adapted.set_adapter("other")
    assert all(".other." in name for name in check_trainable(adapted))


def test_what_is_refused():
    model, _ = fresh("llava")
    refusal("LlavaForConditionalGeneration has no adapters to switch off: give a frozen copy", enter, model)
    refusal("the frozen copy is the sampler itself", enter, model, Wrapped(model))
    refusal("want rank and alpha of at least 1 and dropout in .0, 1., got 0, 0 and 0.0", add_lora, model, 0)
    refusal("got 4, 0 and", add_lora, model, 4, 0)
    refusal("got 4, 8 and 1.0", add_lora, model, 4, dropout=1.0)
    assert not has_adapters(model)
    adapted = add_lora(model, 4)
    assert has_adapters(adapted) and has_adapters(Wrapped(adapted)) and has_adapters(model)
    for one in (adapted, model):
        refusal("has adapters: merge them first, by merge_and_unload", add_lora, one, 4)


def enter(*models):
    with answering(*models):
        raise AssertionError("entered")


def test_rank_and_alpha():
    for alpha, scaling in ((None, 2.0), (6, 1.5)):
        adapted = add_lora(fresh("smolvlm")[0], 4, alpha)
        config = adapted.peft_config["default"]
        assert (config.r, config.lora_alpha / config.r, config.lora_dropout) == (4, scaling, 0.0)


@settings(max_examples=50, deadline=None)
@given(
    layout=st.sampled_from(["turn", "section"]),
    role=st.text(min_size=1),
    answerer=st.none() | st.text(),
    least=st.integers(0, 9999),
)
def test_the_file_beside_a_policy(tmp_path_factory, layout, role, answerer, least):
    folder = tmp_path_factory.mktemp("policy")
    reasoning = Reasoning(layout, role, answerer, least)
    write_reasoning(folder, reasoning)
    assert read_reasoning(folder) == read_reasoning(str(folder)) == reasoning
    shutil.rmtree(folder)


def test_files_that_cannot_be_read(tmp_path):
    assert read_reasoning(tmp_path) == read_reasoning("owner/name") == Reasoning("section", "Analyzer", None, 0)
    path = tmp_path / "reasoning.json"
    for text, words in (
        ("{", "reasoning.json: Expecting"),
        ('{"layout": "turns"}', "reasoning.json: layout: .*turns"),
        ('{"lay": "turn"}', "did you mean layout"),
        ('{"role": 3}', "role: want text, got 3"),
        ('{"min_tokens": -1}', "min_tokens: want at least 0"),
        ("[]", "want fields of Reasoning"),
    ):
        path.write_text(text)
        refusal(words, read_reasoning, tmp_path)


def test_an_answerer_is_found_from_the_policys_folder_and_told_if_it_is_not(tmp_path):
    base, processor = load_policy("pocket")
    for part in (base, processor):
        part.save_pretrained(tmp_path / "study" / "stage")
    arm = tmp_path / "study" / "arm"
    write_reasoning(arm, Reasoning(answerer="../stage"))
    assert load_answerer(arm, base) is not base
    moved_study = (tmp_path / "study").rename(tmp_path / "elsewhere")
    loaded = load_answerer(str(moved_study / "arm"), base)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), base.parameters(), strict=True))
    write_reasoning(moved_study / "arm", Reasoning(answerer="pocket"))
    assert load_answerer(moved_study / "arm", base) is not base
    for gone in ("../stagg", str(arm / "gone"), "owner/no-such-policy"):
        write_reasoning(moved_study / "arm", Reasoning(answerer=gone))
        refusal(f"arm/reasoning.json: answerer: '{gone}' cannot be loaded", load_answerer, moved_study / "arm", base)


def test_a_saved_sampler_comes_back_with_its_answerer(tmp_path):
    base, processor = load_policy("pocket")
    row = make_rows([(1, 3)])
    inputs = encode_prompts(processor, row)
    with torch.no_grad():
        plain = base(**inputs).logits
    adapted = moved(add_lora(base, 4), std=0.05)
    with torch.no_grad():
        on = adapted(**inputs).logits
    adapted.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, its_processor = load_policy(str(tmp_path))
    assert isinstance(again, PeftModel) and not again.training and its_processor.tokenizer.padding_side == "left"
    assert torch.equal(encode_prompts(its_processor, row)["input_ids"], inputs["input_ids"])
    assert all("lora_" in name for name in check_trainable(again))
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, on)
        with answering(again) as pi:
            assert torch.equal(pi(**inputs).logits, plain)
    told = json.loads((tmp_path / "adapter_config.json").read_text())
    assert told["r"] == 4 and told["lora_alpha"] == 8


def test_no_trainer_is_loaded_by_what_does_not_train():
    code = "import sys, vlm_reward.lacot.pair, vlm_reward.lacot.drawing; print('transformers.trainer' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_adapters_of_another_kind():
    "Whatever PEFT can switch off is an answerer."
    model, processor = fresh("llava")
    base = scores(model, processor)
    adapted = get_peft_model(
        model,
        IA3Config(
            target_modules=r".*language_model.*(k_proj|v_proj|down_proj)",
            feedforward_modules=r".*language_model.*down_proj",
            init_ia3_weights=False,
        ),
    )
    on = scores(adapted, processor)
    with answering(adapted) as pi:
        assert torch.equal(scores(pi, processor), base)
    assert torch.equal(scores(adapted, processor), on) and not torch.equal(on, base)
    assert check_trainable(adapted) and all("ia3" in name for name in check_trainable(adapted))
