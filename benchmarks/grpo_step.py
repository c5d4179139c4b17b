"""What a step of GRPO costs: TRL's trainer, and ours without and with shared prompts, in turns, with one thread.

python benchmarks/grpo_step.py [STEPS] [ROUNDS]

Processor seconds, not seconds on the clock, so that other work on the machine disturbs less. All three must log the
same rewards. The split is that of our trainer with shared prompts.
"""

import copy
import functools
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict

import torch
from datasets import Dataset, Image, List
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOTrainer

from vlm_reward.core.runs import Run
from vlm_reward.data.behaviours import classify
from vlm_reward.data.scenes import scene_rows
from vlm_reward.policy.families import image_token_ids, load_policy
from vlm_reward.rewards.presets import get_rubric
from vlm_reward.train.grpo import GRPOSettings, trl_config
from vlm_reward.train.trainer import Recorder, RewardTrainer, StepSeed, quiet

PARTS = {
    "generate": "_generate_single_turn",
    "score": "_calculate_rewards",
    "forward": "compute_loss",
    "record": "write_down",
    "sample, score, record": "_generate_and_score_completions",
}


class Clock(TrainerCallback):
    """Processor seconds of every step."""

    def __init__(self) -> None:
        """Start before the first step."""
        self.ends, self.parts = [], defaultdict(list)

    def on_step_end(self, *args: object, **kw: object) -> None:
        """Note the end of a step."""
        self.ends.append(time.process_time())

    def watch(self, trainer: GRPOTrainer) -> None:
        """Measure parts of the step, too."""
        for name, method in PARTS.items():
            if hasattr(trainer, method):
                setattr(trainer, method, self.timed(getattr(trainer, method), name))
        backward = trainer.accelerator.backward
        trainer.accelerator.backward = self.timed(backward, "backward")

    def timed(self, function, name):
        """Wrap a function so that its seconds are kept."""

        @functools.wraps(function)
        def measured(*args, **kw):
            begin = time.process_time()
            try:
                return function(*args, **kw)
            finally:
                self.parts[name].append(time.process_time() - begin)

        return measured

    def seconds(self) -> list[float]:
        """Seconds of each step but the first two, which also warm up and try sharing."""
        return [b - a for a, b in zip(self.ends[1:], self.ends[2:], strict=False)]


def train(
    way: str,  # TRL, plain or shared
    policy,  # a model and its processor
    rows: list,  # prompts
    steps: int,
) -> tuple[Clock, list[float]]:  # seconds; rewards per step
    """Train a copy of the policy."""
    model, processor = copy.deepcopy(policy[0]), policy[1]
    preset, clock = get_rubric("format+accuracy").rubric, Clock()
    more = {"processing_class": processor, "callbacks": [clock]}
    with tempfile.TemporaryDirectory() as folder, quiet():
        banned = image_token_ids(model)
        args = trl_config(GRPOSettings(steps=steps), folder, weights=preset.reward_weights, banned=banned)
        if way == "TRL":
            data = Dataset.from_list(
                [{k: r[k] for k in ("id", "prompt", "images", "solution", "choices")} for r in rows]
            )
            data = data.cast_column("images", List(Image()))
            trainer = GRPOTrainer(model, preset.reward_funcs, args, train_dataset=data, **more)
            trainer.add_callback(StepSeed())
        else:
            recorder = Recorder(Run.open(folder, "run", {}, "0"), classify)
            more |= {"rows": rows, "recorder": recorder, "share_prompts": way == "shared"}
            trainer = RewardTrainer(model, preset.reward_funcs, args, **more)
        trainer.remove_callback(PrinterCallback)
        clock.watch(trainer)
        trainer.train()
    return clock, [line["reward"] for line in trainer.state.log_history[:steps]]


def main(steps: int = 8, rounds: int = 2) -> None:
    """Print a table, and the figures as JSON."""
    torch.set_num_threads(1)
    with quiet():
        policy = load_policy("pocket")
    rows = scene_rows("relation", 64)
    found, rewards, clock = defaultdict(list), {}, Clock()
    for _ in range(rounds):
        for way in ("TRL", "plain", "shared"):
            clock, rewards[way] = train(way, policy, rows, steps)
            found[way] += clock.seconds()
    cost = {way: statistics.median(seconds) for way, seconds in found.items()}
    print(f"{'64 completions':24} {'s per step':>10} {'TRL / this':>10}")
    for way, seconds in cost.items():
        print(f"{way:24} {seconds:10.3f} {cost['TRL'] / seconds:10.2f}")
    split = {name: statistics.median(seconds[2:]) for name, seconds in clock.parts.items()}
    whole = split.pop("sample, score, record")
    split["prepare"] = whole - split["generate"] - split["score"] - split["record"]
    split["other"] = statistics.median(clock.seconds()) - whole - split["forward"] - split["backward"]
    for name, seconds in sorted(split.items(), key=lambda item: -item[1]):
        print(f"  {name:22} {seconds:10.3f} {seconds / cost['shared']:10.0%}")
    figures = {f"{way}_s": seconds for way, seconds in cost.items()} | {"ratio": cost["TRL"] / cost["shared"]}
    same = all(abs(a - b) < 1e-6 for way in rewards for a, b in zip(rewards["TRL"], rewards[way], strict=True))
    ok = same and cost["shared"] < cost["TRL"]
    print(json.dumps({**{k: round(v, 3) for k, v in figures.items()}, "same_rewards": same, "ok": ok}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
