"""What Muon buys: the first stage of the pocket, shortened, with AdamW and with Muon from the same weights and examples.

python benchmarks/muon.py [STEPS]
"""

import json
import sys
import time
from dataclasses import replace

import torch
from transformers import set_seed

from vlm_reward.policy.pocket import make_model, make_processor, train_tokenizer
from vlm_reward.studies.pocket_build import PocketSettings, corpus, plan_stages
from vlm_reward.train.sft import train_sft


def losses(
    optimizer: str,  # muon or adamw
    lr: float,  # highest learning rate
    steps: int,  # of the first stage
) -> tuple[float, float]:  # mean loss of the last tenth of the steps, seconds per step
    """Train a fresh pocket and say how far it came."""
    set_seed(0)
    processor = make_processor(train_tokenizer(corpus(100)))
    model = make_model(processor.tokenizer)
    stage = plan_stages(PocketSettings(see=steps, loaders=0))[0]
    seen = []
    begin = time.perf_counter()
    settings = replace(stage.sft, optimizer=optimizer, lr=lr)
    train_sft(
        model, processor, stage.demonstrations, settings, progress=lambda _, metrics: seen.append(metrics["loss"])
    )
    last = seen[-max(1, len(seen) // 10) :]
    return sum(last) / len(last), (time.perf_counter() - begin) / steps


def main(steps: int = 200) -> None:
    """Print a table, and the figures as JSON."""
    torch.set_num_threads(1)
    found = {
        f"{name} at {lr}": losses(name, lr, steps) for name, lr in (("adamw", 1e-3), ("adamw", 2e-3), ("muon", 2e-3))
    }
    print(f"{'optimizer':16} {'loss (nats)':>12} {'s per step':>12}")
    for name, (loss, seconds) in found.items():
        print(f"{name:16} {loss:12.3f} {seconds:12.3f}")
    *others, (muon, cost) = found.values()
    best, quickest = min(loss for loss, _ in others), min(seconds for _, seconds in others)
    figures = {"steps": steps, "loss_ratio": muon / best, "step_cost_ratio": cost / quickest}
    print(json.dumps({**{k: round(v, 3) for k, v in figures.items()}, "ok": muon < best}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
