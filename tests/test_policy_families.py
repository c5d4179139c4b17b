"What the engine must know of a family: layouts of inputs, positions, what can be packed, towers, adapters."

import copy
import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import (
    GraniteMoeHybridConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
)

from vlm_reward.core.rows import make_row
from vlm_reward.policy.families import (
    FAMILIES,
    bare_model,
    check_device,
    count_images,
    family_of,
    freeze_vision_tower,
    image_token_ids,
    load_policy,
    lora_targets,
    not_loadable,
    packing_problem,
    prompt_positions,
    rows_of_groups,
    take_prompts,
)
from vlm_reward.policy.sampling import encode_prompts
from vlm_reward.policy.specimens import SPECIMENS, specimen

EACH = pytest.mark.parametrize("family", SPECIMENS)
MADE = {}


def made(family):
    "The specimen that all tests of this file share; a test that changes it takes a copy."
    if family not in MADE:
        MADE[family] = specimen(family)
    return MADE[family]


def fresh(family):
    model, processor = made(family)
    return copy.deepcopy(model), processor


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def row_of(*images, question="what ?"):
    return make_row(id="a", task="t", question=question, images=list(images), solution="x")


def logits_of(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


class Wrapped(torch.nn.Module):
    "As DDP and FSDP hold a model."

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **inputs):
        return self.module(**inputs)


def adapted(model):
    return get_peft_model(model, LoraConfig(r=2, target_modules=lora_targets(model), init_lora_weights=False))


# names


@EACH
def test_family_is_found_through_wrappers(family):
    model, _ = fresh(family)
    assert family_of(model) is FAMILIES[family]
    assert bare_model(Wrapped(model)) is model and family_of(Wrapped(model)).name == family
    ids = image_token_ids(model)
    peft = adapted(model)
    assert family_of(peft).name == family and family_of(Wrapped(peft)).name == family
    assert image_token_ids(peft) == image_token_ids(Wrapped(peft)) == ids


def test_unknown_families_are_one_line():
    text = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=8,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
        )
    )
    for call in (family_of, lambda m: take_prompts(m, {}, torch.tensor([0]), images_per_prompt=[0])):
        with pytest.raises(ValueError, match="unknown family 'qwen2' of Qwen2ForCausalLM") as error:
            call(text)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="holds no model of transformers"):
        family_of(torch.nn.Linear(1, 1))
    assert "unknown family 'qwen2'" in packing_problem(text)


# prompts out of a batch


@given(st.lists(st.integers(0, 4), min_size=1, max_size=6), st.data())
@settings(deadline=None, max_examples=200)
def test_rows_of_groups_against_lists(lengths, data):
    which = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=6))
    first = np.cumsum([0, *lengths])
    expected = [row for group in which for row in range(first[group], first[group + 1])]
    found = rows_of_groups(torch.tensor(lengths), torch.tensor(which, dtype=torch.long))
    assert found.tolist() == expected


SIZES = [(30, 30), (90, 40), (20, 120), (64, 64), (1, 1)]
BATCHES = st.lists(st.lists(st.sampled_from(SIZES), max_size=2), min_size=1, max_size=4)


@EACH
@given(BATCHES, st.data())
@settings(deadline=None, max_examples=12)
def test_prompts_taken_are_as_processed_alone(family, batch, data):
    "Against the processor's own inputs for the rows that are wanted, through the model."
    model, processor = made(family)
    rows = [
        row_of(*(noise(*size, seed=10 * i + j) for j, size in enumerate(sizes)), question="what ?" * (i + 1))
        for i, sizes in enumerate(batch)
    ]
    which = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=5))
    inputs = encode_prompts(processor, rows)
    taken = take_prompts(model, inputs, torch.tensor(which), images_per_prompt=[len(sizes) for sizes in batch])
    alone = encode_prompts(processor, [rows[i] for i in which])
    ours, theirs = logits_of(model, taken), logits_of(model, alone)
    for i, mask in enumerate(alone["attention_mask"]):
        kept = taken["attention_mask"][i].bool()
        assert torch.equal(taken["input_ids"][i, kept], alone["input_ids"][i, mask.bool()])
        torch.testing.assert_close(ours[i, kept], theirs[i, mask.bool()], atol=1e-4, rtol=1e-4)


@EACH
def test_a_group_is_its_prompt_repeated(family):
    "As TRL repeats rows: every field of the repeated batch is the processor's for repeated rows."
    model, processor = made(family)
    rows = [row_of(noise(64, 64), question="one ?"), row_of(noise(90, 40), noise(30, 30), question="two ?")]
    inputs = encode_prompts(processor, rows)
    taken = take_prompts(model, inputs, torch.tensor([0, 0, 0, 1, 1, 1]), images_per_prompt=[1, 2])
    whole = encode_prompts(processor, [rows[0]] * 3 + [rows[1]] * 3)
    assert set(taken) == set(whole)
    assert all(torch.equal(taken[name], whole[name]) for name in whole)


@EACH
def test_fields_that_are_none_are_left_out(family):
    model, processor = made(family)
    inputs = encode_prompts(processor, [row_of(noise(64, 64))]) | {"token_type_ids": None, "spatial_shapes": None}
    assert None not in take_prompts(model, inputs, torch.tensor([0]), images_per_prompt=[1]).values()


@EACH
def test_counts_that_do_not_fit_are_refused(family):
    model, processor = made(family)
    inputs = encode_prompts(processor, [row_of(noise(64, 64)), row_of(noise(64, 64))])
    cases = {"1 counts for 2 prompts": [1], "counts 0 pictures": [0, 0]}
    if "image" in FAMILIES[family].layout.values():
        cases["counts 3 pictures, but '[a-z_]+' has 2 rows"] = [2, 1]
    for words, counts in cases.items():
        with pytest.raises(ValueError, match=words) as error:
            take_prompts(model, inputs, torch.tensor([0]), images_per_prompt=counts)
        assert "\n" not in str(error.value)


@EACH
@pytest.mark.parametrize("which", [[-1], [0, 2], [0, -3, 1]])
def test_prompts_that_the_batch_does_not_have_are_refused(family, which):
    model, processor = made(family)
    inputs = encode_prompts(processor, [row_of(noise(64, 64)), row_of(noise(64, 64))])
    wrong = min(n for n in which if n not in (0, 1))
    with pytest.raises(ValueError, match=f"no prompt {wrong} in a batch of 2"):
        take_prompts(model, inputs, torch.tensor(which), images_per_prompt=[1, 1])


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_patches_that_do_not_fit_their_grids_are_refused(family):
    model, processor = made(family)
    inputs = encode_prompts(processor, [row_of(noise(64, 64)), row_of(noise(64, 64))])
    pixels = inputs["pixel_values"]
    for wrong in (pixels[:-1], torch.cat([pixels, pixels[:4]])):
        with pytest.raises(ValueError, match=f"counts {len(pixels)} patches, but 'pixel_values' has {len(wrong)} rows"):
            take_prompts(model, inputs | {"pixel_values": wrong}, torch.tensor([0]), images_per_prompt=[1, 1])
    for without in (inputs | {"image_grid_thw": None}, {n: v for n, v in inputs.items() if n != "image_grid_thw"}):
        with pytest.raises(ValueError, match="'pixel_values' by prompt without 'image_grid_thw'"):
            take_prompts(model, without, torch.tensor([0]), images_per_prompt=[1, 1])


@pytest.mark.parametrize("device", ["gpu", "", "cuda:x", "meta", "cpu:"])
def test_devices_that_do_not_exist_are_one_line_before_anything_is_loaded(device, monkeypatch):
    monkeypatch.setattr("vlm_reward.policy.families.AutoProcessor", None)
    with pytest.raises(ValueError, match=f"^cannot put the policy on device '{device}': .*; use cpu, or cuda") as error:
        load_policy("pocket", device=device)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there():
    with pytest.raises(ValueError, match=r"cannot put the policy on device 'cuda': .*use cpu"):
        load_policy("pocket", device="cuda")


def test_a_full_device_says_so_itself(monkeypatch):
    def full(*args, **options):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(torch, "zeros", full)
    with pytest.raises(torch.OutOfMemoryError, match="no memory left"):
        check_device("cuda")


@pytest.mark.parametrize("error", [OSError(), ValueError(" "), ImportError("\n")])
def test_errors_without_words_are_told_by_their_kind(error):
    assert f"'a/b': {type(error).__name__} (use" in not_loadable("a/b", None, error)


def test_the_kind_of_attention_is_a_choice():
    model, _ = load_policy("pocket", attention="eager")
    assert model.config.get_text_config()._attn_implementation == "eager"
    assert packing_problem(model) is None
    with pytest.raises(ValueError, match=r"cannot load policy 'pocket': .*slow.*choose another attention"):
        load_policy("pocket", attention="slow")


def test_names_with_dots_and_signs_are_matched_literally():
    "A pattern for a decoder that stands under an odd name matches its layers alone."
    model, _ = fresh("llava")
    inner = model.model.language_model
    model.model = torch.nn.ModuleDict(
        {"a+b": torch.nn.ModuleDict({"language_model": inner}), "visual": torch.nn.Linear(2, 2)}
    )
    pattern = re.compile(lora_targets(model))
    assert sum(bool(pattern.fullmatch(name)) for name, _ in model.named_modules()) == 14


def test_images_are_counted():
    for n in range(3):
        assert count_images(row_of(*[noise(4, 4)] * n)["prompt"]) == n
    assert count_images([{"role": "user", "content": "an image?"}]) == 0


# positions


def rows_of_all_kinds():
    return [
        row_of(question="what is it ?"),
        row_of(noise(90, 40)),
        row_of(noise(30, 30), noise(20, 120), question="which ?"),
    ]


def generated_positions(model, inputs):
    "What `generate` gives the model for the prompt."
    seen = {}

    def note(_, __, given):
        seen.setdefault("positions", given.get("position_ids"))

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    model.generate(**inputs, max_new_tokens=1, do_sample=False)
    hook.remove()
    return seen["positions"]


@EACH
def test_positions_are_those_of_generate(family):
    model, processor = made(family)
    inputs = encode_prompts(processor, rows_of_all_kinds())
    theirs, ours = generated_positions(model, inputs), prompt_positions(model, inputs)
    theirs = theirs[-3:] if theirs.dim() == 3 else theirs[None]
    real = inputs["attention_mask"].bool()
    assert torch.equal(ours[:, real], theirs[:, real]) and not ours[:, ~real].any()


@EACH
def test_positions_are_those_of_the_plain_forward(family):
    model, processor = made(family)
    for rows in (rows_of_all_kinds(), rows_of_all_kinds()[:1], rows_of_all_kinds()[1:]):
        inputs = encode_prompts(processor, rows)
        positions = prompt_positions(model, inputs)
        real = inputs["attention_mask"].bool()
        given = logits_of(model, inputs | {"position_ids": positions[0] if len(positions) == 1 else positions})
        torch.testing.assert_close(given[real], logits_of(model, inputs)[real], atol=1e-4, rtol=1e-4)


@EACH
def test_positions_leave_no_state_behind(family):
    "Qwen models remember the positions of the last batch; asking for positions must not change that."
    model, processor = fresh(family)
    inputs = encode_prompts(processor, rows_of_all_kinds())
    stateful = [module for module in model.modules() if hasattr(module, "rope_deltas")]
    assert bool(stateful) == family.startswith("qwen")
    for module in stateful:
        module.rope_deltas = "as before"
    positions = prompt_positions(model, inputs)
    assert torch.equal(prompt_positions(Wrapped(adapted(model)), inputs), positions)
    assert all(module.rope_deltas == "as before" for module in stateful)


@EACH
def test_positions_without_mask_or_kinds(family):
    model, processor = made(family)
    inputs = encode_prompts(processor, [row_of(noise(90, 40))])
    bare = {name: value for name, value in inputs.items() if name not in ("attention_mask", "mm_token_type_ids")}
    assert torch.equal(prompt_positions(model, bare), prompt_positions(model, inputs))


# packing


@EACH
def test_specimens_can_be_packed(family):
    model, _ = fresh(family)
    assert packing_problem(model) is None
    assert packing_problem(Wrapped(adapted(model))) is None


def llava_with(text):
    vision = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=16,
        patch_size=8,
        vision_use_head=False,
    )
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision.to_dict(), text_config=text.to_dict()))


SMALL = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


HYBRID = {"mamba_n_heads": 2, "mamba_d_state": 4, "num_local_experts": 0, "shared_intermediate_size": 16}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (MistralConfig(**SMALL, sliding_window=64), "window of 64 tokens"),
        (MistralConfig(**SMALL, sliding_window=None), None),
        (Qwen2Config(**SMALL, use_sliding_window=True, max_window_layers=1, sliding_window=8), "sliding_attention"),
        (Qwen2Config(**SMALL, use_sliding_window=False, sliding_window=8), None),
        (GraniteMoeHybridConfig(**SMALL, **HYBRID), "linear_attention"),
        (GraniteMoeHybridConfig(**SMALL, **HYBRID, layer_types=["full_attention"] * 2), "passes a state"),
    ],
    ids=["mistral", "mistral without window", "qwen2 with windows", "qwen2", "hybrid", "stateful"],
)
def test_text_models_that_cannot_be_packed(text, words):
    problem = packing_problem(llava_with(text))
    assert (problem is None) == (words is None)
    assert words is None or (words in problem and "\n" not in problem)


@pytest.mark.parametrize("kernel", ["flash_attention_2", "flash_attention_3", "flex_attention"])
@EACH
def test_kernels_without_masks_cannot_be_packed(family, kernel):
    model, _ = fresh(family)
    model.config.get_text_config()._attn_implementation = kernel
    assert f"attention '{kernel}' takes no mask" in packing_problem(model)


@EACH
def test_a_tower_with_its_own_kernel_can_be_packed(family):
    model, _ = fresh(family)
    model.config.vision_config._attn_implementation = "flash_attention_2"
    assert packing_problem(model) is None


@EACH
def test_eager_attention_can_be_packed(family):
    model, _ = fresh(family)
    model.set_attn_implementation("eager")
    assert packing_problem(model) is None


# towers and adapters

LANGUAGE = {"smolvlm": "text_model", "idefics3": "text_model"}


def gradient_names(model, processor):
    "The parameters that a loss reaches."
    inputs = encode_prompts(processor, [row_of(noise(90, 40))])
    model(**inputs).logits.log_softmax(-1)[..., 5].sum().backward()
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}


@EACH
def test_a_frozen_tower_gets_no_gradient_and_the_rest_does(family):
    model, processor = fresh(family)
    reached = gradient_names(model, processor)
    model, processor = fresh(family)
    fixed = freeze_vision_tower(model)
    left = gradient_names(model, processor)
    merger = {name for name in reached if ".merger." in name or ".deepstack_merger_list." in name}
    projector = {name for name in reached if "multi_modal_projector" in name or ".connector." in name}
    tower = {name for name in reached if any(t in name for t in (".vision_tower.", ".visual.", ".vision_model."))}
    tower -= merger
    assert tower and (merger or projector) and left == reached - tower
    assert fixed == sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert freeze_vision_tower(model) == fixed


@EACH
def test_freezing_reaches_through_wrappers(family):
    model, _ = fresh(family)
    plain, _ = fresh(family)
    assert freeze_vision_tower(Wrapped(model)) == freeze_vision_tower(plain)
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in plain.parameters()]


@EACH
def test_adapters_are_in_the_language_model_alone(family):
    model, processor = fresh(family)
    decoder = model.get_submodule(f"model.{LANGUAGE.get(family, 'language_model')}")
    linear = {id(module) for module in decoder.modules() if isinstance(module, torch.nn.Linear)}
    assert len(linear) == 14
    peft = adapted(model)
    targets = {id(module.base_layer) for module in peft.modules() if hasattr(module, "base_layer")}
    assert targets == linear
    reached = gradient_names(peft, processor)
    assert reached and all("lora_" in name for name in reached)


def test_a_model_without_language_model():
    with pytest.raises(ValueError, match="no vision tower"):
        lora_targets(Qwen2ForCausalLM(Qwen2Config(**SMALL)))


@EACH
def test_a_truncated_prompt_is_refused_by_processor_and_model(family):
    model, processor = made(family)
    row = row_of(noise(90, 40))
    text = processor.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
    with pytest.raises((ValueError, TypeError)):  # Idefics3 counts before it looks, and fails in counting
        processor(text=[text], images=[row["images"]], truncation=True, max_length=16, return_tensors="pt")
    inputs = encode_prompts(processor, [row])
    cut = {n: v[:, -30:] if FAMILIES[family].layout[n] == "token" else v for n, v in inputs.items()}
    assert (cut["input_ids"] == model.config.image_token_id).any()
    with pytest.raises((ValueError, RuntimeError)):
        logits_of(model, cut)


def saved(folder, base):
    "A folder of adapters that name what they stand on."
    folder.mkdir()
    model, processor = load_policy("pocket")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(folder)
    processor.save_pretrained(folder)
    told = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    return adapted


def test_a_folder_of_adapters_is_a_policy(tmp_path):
    inputs = encode_prompts(load_policy("pocket")[1], [row_of(noise(40, 40))])
    for base in ("pocket", "/elsewhere/site-packages/vlm_reward/policy/pocket_checkpoint"):
        folder = tmp_path / str(len(base))
        adapted = saved(folder, base)
        again, processor = load_policy(str(folder), dtype="bfloat16", attention="eager")
        text = bare_model(again).config.get_text_config()
        assert text._attn_implementation == "eager" and bare_model(again).dtype == torch.bfloat16
        again, processor = load_policy(str(folder))
        assert processor.tokenizer.padding_side == "left" and not again.training
        assert torch.equal(logits_of(again, inputs), logits_of(adapted.eval(), inputs))
        assert [name for name, p in again.named_parameters() if p.requires_grad] == [
            name for name, p in adapted.named_parameters() if p.requires_grad
        ]


def test_adapters_on_a_checkpoint_that_was_trained(tmp_path):
    model, processor = load_policy("pocket")
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.1)
    model.save_pretrained(tmp_path / "sft")
    processor.save_pretrained(tmp_path / "sft")
    adapted = get_peft_model(
        load_policy(str(tmp_path / "sft"))[0], LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "rl")  # without a processor: that of the base
    inputs = encode_prompts(processor, [row_of(noise(40, 40))])
    again, _ = load_policy(str(tmp_path / "rl"))
    assert torch.equal(logits_of(again, inputs), logits_of(adapted.eval(), inputs))
    with again.disable_adapter():
        assert torch.equal(logits_of(again, inputs), logits_of(model, inputs))


def test_adapters_that_stand_on_nothing_are_one_line(tmp_path):
    saved(tmp_path / "gone", tmp_path / "nowhere")
    saved(tmp_path / "none", "")
    saved(tmp_path / "one", "pocket")
    saved(tmp_path / "two", tmp_path / "one")
    for name, words in (
        ("gone", "nowhere', which is not there: write where it is into base_model_name_or_path"),
        ("none", "stand on the policy '', which is not there"),
        ("two", "one', which has adapters itself: merge those first"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)) as error:
            load_policy(str(tmp_path / name))
        assert "\n" not in str(error.value) and str(tmp_path / name) in str(error.value)
    (tmp_path / "one" / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config\.json is no JSON: Expecting"):
        load_policy(str(tmp_path / "one"))


def test_adapters_that_do_not_fit_are_one_line(tmp_path):
    saved(tmp_path / "one", "pocket")
    told = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    for change in ({"r": 4}, {"target_modules": ["no_such_layer"]}):
        (tmp_path / "one" / "adapter_config.json").write_text(json.dumps(told | change))
        with pytest.raises(ValueError, match="cannot load policy") as error:
            load_policy(str(tmp_path / "one"))
        assert "\n" not in str(error.value)
    (tmp_path / "one" / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot load policy"):
        load_policy(str(tmp_path / "one"))
