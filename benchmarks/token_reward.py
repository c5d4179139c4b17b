"""Exact log rewards at every prefix of a rationale, and one forward per anchor at every eighth.

python benchmarks/token_reward.py [--quick] [--rounds N] [--case Z Y] [--layout turn|section]

A random Qwen2.5-VL of 11 M parameters, a prompt of 298 tokens, 256 of them of its picture. Other ways of computing the
reward look at every eighth state and at the last, each in a forward of its own, one after the other:

* released: question, picture and prefix are read anew for every anchor, as the released code does;
* question: the question and its picture are kept in a cache; every anchor reads its prefix and its end;
* trunk: the rationale is kept in the cache, too; every anchor reads its end alone.

Ours reads the rationale once and scores the ends of all states, or those of the same anchors ("ours, anchors"). Processor
seconds with one thread, medians of rounds in turns; peak memory of a child process each, above that before. `tokens` is
how many the language model reads.

Goals, for 512 tokens of rationale: all states 1.5 times faster than the anchors of trunk, 1.5 times faster than those of
question, 5 times faster than released. The first is not reached on a CPU, where all states cost more than the anchors of
trunk: ours then reads the ends of eight times as many states, 4.4 times as many tokens in all, and one thread pays for
every token. What ours saves there is the cost of a forward as such. `ok` asks for the other two, `goals` in the JSON tells
of each whether it was reached.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from packing import make_batch, random_model

from vlm_reward.lacot.token_reward import reward_parts, state_tail
from vlm_reward.lacot.turns import Turns, follow
from vlm_reward.rewards.likelihood import anchors

HIDDEN, LAYERS, INTERVAL = 256, 6, 8
CASES = [("turn", 512, 8), ("section", 128, 6)]  # layout, tokens of the rationale, of the answer with what closes it
QUICK = [("turn", 32, 4)]
GOALS = {"trunk": 1.5, "question": 1.5, "released": 5.0}  # for rationales of at least `LONG` tokens
HELD = ("question", "released")  # what `ok` asks for: on a CPU the first is not reached
LONG = 512
GAP = 1e-4  # allowed between log P(T Y | X, Z), nats
LAYOUTS = {  # as many tokens as the templates of Qwen2.5-VL and of the pocket write
    "turn": Turns("turn", "Analyzer", (7, 8, 9), 2, (10, 7, 11, 9), (2,), (7, 11, 9), ""),
    "section": Turns("section", "", (7, 11, 9, 12), 13, (14,), (15, 2), (7, 11, 9, 14), ""),
}


class Case:
    """A question, a rationale, an answer and the layout of their turns."""

    def __init__(self, rationale: int, answer: int, layout: str):
        self.inputs, texts = make_batch(1, 256, rationale + answer)
        texts = texts[0].tolist()
        self.turns, self.rationale = LAYOUTS[layout], texts[:rationale]
        closing = self.turns.closing
        self.answer = [*texts[rationale : rationale + answer - len(closing)], *closing]
        self.prompt = self.inputs["input_ids"].shape[1]
        self.before, self.first = [*self.turns.opening, *self.rationale], len(self.turns.opening)
        self.tail = state_tail(self.turns, self.answer, self.prompt, 1)
        self.at = anchors(rationale + 1, INTERVAL).tolist()


def tail_sum(logits: torch.Tensor, case: Case) -> float:
    """log P(T Y | X, Z), of the logits that predict the tokens of a tail."""
    logprobs = logits.log_softmax(-1).gather(-1, torch.tensor(case.tail.tokens)[:, None])[:, 0]
    return logprobs[list(case.tail.scored)].sum().item()


def behind(model, case: Case, cache, ids: list[int], logits: int) -> torch.Tensor:
    """Read ids behind what is in a cache, and take them out again; logits of the last of them."""
    begin = cache.get_seq_length() + int(model.model.rope_deltas)
    where = torch.arange(begin, begin + len(ids)).expand(3, 1, -1)
    out = model(
        input_ids=torch.tensor([ids]), position_ids=where, past_key_values=cache, use_cache=True, logits_to_keep=logits
    )
    cache.crop(-len(ids))
    return out.logits[0]


@torch.no_grad()
def released(model, case: Case) -> dict[int, float]:
    """Question, picture, prefix and end, read anew for every anchor."""
    found, size = {}, len(case.tail.tokens)
    for t in case.at:
        whole = follow(model, case.inputs, [[*case.before[: case.first + t], *case.tail.tokens]])
        found[t] = tail_sum(model(**whole, logits_to_keep=size + 1, use_cache=False).logits[0, :-1], case)
    return found


@torch.no_grad()
def question(model, case: Case) -> dict[int, float]:
    """Question and picture read once; prefix and end for every anchor."""
    cache, size = model(**case.inputs, use_cache=True, logits_to_keep=1).past_key_values, len(case.tail.tokens)
    ends = {t: [*case.before[: case.first + t], *case.tail.tokens] for t in case.at}
    return {t: tail_sum(behind(model, case, cache, ids, size + 1)[:-1], case) for t, ids in ends.items()}


@torch.no_grad()
def trunk(model, case: Case) -> dict[int, float]:
    """Question, picture and rationale read once; the end alone for every anchor, without its last token."""
    whole = follow(model, case.inputs, [case.before])
    out = model(**whole, use_cache=True, logits_to_keep=len(case.rationale) + 1)
    cache, found, ids = out.past_key_values, {}, case.tail.tokens[:-1]
    for t in reversed(case.at):
        if cache.get_seq_length() > case.prompt + case.first + t:
            cache.crop(case.prompt + case.first + t - cache.get_seq_length())
        logits = torch.cat([out.logits[0, t : t + 1], behind(model, case, cache, ids, len(ids))])
        found[t] = tail_sum(logits, case)
    return found


def ours(model, case: Case, interval: int = 1) -> dict[int, float]:
    """All states, or anchors, off one trunk."""
    (parts,) = reward_parts(
        model, case.turns, case.inputs, [case.rationale], case.answer, empty="turn", interval=interval
    )
    return dict(zip(parts.at.tolist(), (parts.stop + parts.answer).tolist(), strict=True))


def ours_at_anchors(model, case: Case) -> dict[int, float]:
    """The states that the other ways look at."""
    return ours(model, case, INTERVAL)


WAYS: dict[str, Callable] = {
    "released": released,
    "question": question,
    "trunk": trunk,
    "ours": ours,
    "ours, anchors": ours_at_anchors,
}


def tokens_read(case: Case) -> dict[str, int]:
    """What passes the language model."""
    states, size, kept = len(case.rationale) + 1, len(case.tail.tokens), case.prompt + len(case.before)
    prefixes = sum(case.first + t + size for t in case.at)
    return {
        "released": len(case.at) * case.prompt + prefixes,
        "question": case.prompt + prefixes,
        "trunk": kept + len(case.at) * (size - 1),
        "ours": kept + states * (size - 1),
        "ours, anchors": kept + len(case.at) * (size - 1),
    }


def seconds(model, case: Case, rounds: int) -> dict[str, float]:
    """Median processor seconds of each way, in turns."""
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, function in WAYS.items():
            begin = time.process_time()
            function(model, case)
            found[way].append(time.process_time() - begin)
    return {way: statistics.median(times) for way, times in found.items()}


def child(way: str, sizes: list[int], layout: str) -> None:
    """One run; print the peak of memory above that before it, in MiB."""
    torch.set_num_threads(1)
    model = random_model(HIDDEN, LAYERS)
    WAYS[way](model, Case(8, 4, layout))  # what the first run loads
    case, held = Case(*sizes, layout), []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    while resource.getrusage(resource.RUSAGE_SELF).ru_maxrss <= before:  # use up what was freed
        held.append(torch.ones(2**18))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    WAYS[way](model, case)
    print(json.dumps((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))


def memory(sizes: list[int], layout: str) -> dict[str, float]:
    """Peak of each way in a process of its own, MiB."""
    found = {}
    for way in WAYS:
        command = [sys.executable, __file__, "--child", way, "--layout", layout, "--case", *map(str, sizes)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[way] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(model, sizes: list[int], layout: str, rounds: int) -> dict:
    """Measure one case."""
    case = Case(*sizes, layout)
    exact = ours(model, case)
    gaps = {way: max(abs(exact[t] - value) for t, value in WAYS[way](model, case).items()) for way in WAYS}
    times, read = seconds(model, case, rounds), tokens_read(case)
    faster = {way: times[way] / times["ours"] for way in GOALS}
    faster["trunk, the same anchors"] = times["trunk"] / times["ours, anchors"]
    return {
        "layout": layout,
        "prompt": case.prompt,
        "rationale": sizes[0],
        "answer": sizes[1],
        "states": len(exact),
        "anchors": len(case.at),
        "seconds": times,
        "faster": faster,
        "tokens": read,
        "peak_mib": memory(sizes, layout),
        "gap": max(gaps.values()),
    }


REREAD = {
    "trunk": "rationale in the cache",
    "question": "question in the cache, prefix read anew",
    "released": "everything read anew",
}


def summary(row: dict, long: bool) -> None:
    """Print how all states compare with anchors, then what it rests on."""
    print(
        f"{row['layout']}: prompt {row['prompt']}, rationale {row['rationale']}, answer {row['answer']}: all "
        f"{row['states']} states against {row['anchors']} anchors"
    )
    for way, goal in GOALS.items():
        faster = row["faster"][way]
        reached = f"; goal {goal}x, {'reached' if faster >= goal else 'NOT reached'}" if long else ""
        print(f"  {way + ',':9} {REREAD[way] + ':':40} {faster:5.2f}x as fast{reached}")
    for way in WAYS:
        print(f"  {way:14} {row['seconds'][way]:7.2f} s {row['tokens'][way]:7d} tokens {row['peak_mib'][way]:6.0f} MiB")
    print(f"  the same anchors: {row['faster']['trunk, the same anchors']:.2f}x as fast as trunk", end="; ")
    print(f"gap {row['gap']:.0e} nats", flush=True)


def against_goals(rows: list[dict]) -> dict[str, dict]:
    """Of each goal: what was found in the long cases, and whether it was reached."""
    found = {way: [row["faster"][way] for row in rows if row["rationale"] >= LONG] for way in GOALS}
    return {
        way: {"goal": goal, "faster": found[way], "reached": all(faster >= goal for faster in found[way])}
        for way, goal in GOALS.items()
        if found[way]
    }


def main() -> None:
    """Measure all cases and print a table; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one small case, one round; speed is no goal")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--case", type=int, nargs=2, metavar=("Z", "Y"), help="this case alone")
    parser.add_argument("--layout", choices=sorted(LAYOUTS), help="this layout alone")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options.child, options.case, options.layout)
    torch.set_num_threads(1)
    cases = QUICK if options.quick else CASES
    cases = [
        (options.layout or layout, *(options.case or sizes)) for layout, *sizes in cases[: 1 if options.case else None]
    ]
    model, rows = random_model(HIDDEN, LAYERS), []
    for way in WAYS.values():
        way(model, Case(16, 4, "turn"))
    for layout, *sizes in cases:
        row = measure(model, sizes, layout, 1 if options.quick else options.rounds)
        rows.append(row)
        summary(row, sizes[0] >= LONG)
    equal, goals = all(row["gap"] < GAP for row in rows), against_goals(rows)
    fast = all(goals[way]["reached"] for way in HELD if way in goals)
    figures = {"goals": goals, "rounds": options.rounds, "torch": torch.__version__, "cases": rows}
    print(json.dumps({"ok": equal and fast, "equal": equal, "fast": fast, **figures}))
    return None


if __name__ == "__main__":
    main()
