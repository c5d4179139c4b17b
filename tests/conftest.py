"""A tiny vision-language model with random weights, for tests that need a real model but no knowledge."""

import copy
import signal
import socket
import time

import pytest
import torch
from hypothesis import settings
from PIL import Image

# the same examples in every run: a red run can be repeated; tools/fuzz.py looks for new ones
settings.register_profile("steady", derandomize=True)
settings.load_profile("steady")


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_can_be_sent():
    "A job that a shell starts in the background ignores Ctrl-C, and so would every process that the tests start."
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    "The machine is small, and its numbers shall not depend on how many cores are free."
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_vlm():
    "(model, processor) shared by all tests: do not train this model, take `fresh_vlm`."
    from vlm_reward.policy.specimens import specimen  # takes seconds, and few tests need it

    return specimen("llava", hidden=32, heads=2, vision_layers=1, image_size=64, patch=16)


@pytest.fixture
def fresh_vlm(tiny_vlm):
    "(model, processor) of this test alone; the same weights each time."
    model, processor = tiny_vlm
    return copy.deepcopy(model), processor


@pytest.fixture(scope="session")
def tiny_rows():
    "Twelve rows with pictures of one colour each."
    from vlm_reward.core.rows import make_row

    colours = ["red", "green", "blue", "yellow"]
    return [
        make_row(
            id=f"tiny-{i}",
            task="tiny/colour",
            question=f"what colour is picture {i} ?",
            images=[Image.new("RGB", (64, 64), colours[i % 4])],
            solution=colours[i % 4],
        )
        for i in range(12)
    ]


@pytest.fixture
def in_two_processes():
    "Run function(rank, port, *more) in two processes that find each other at a port; they have two minutes."

    def run(function, *more):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # new processes: a forked child of a process with threads can wait for a lock that nobody holds
        both = torch.multiprocessing.start_processes(
            function, (port, *more), nprocs=2, join=False, start_method="spawn"
        )
        try:
            deadline = time.monotonic() + 120
            while not both.join(timeout=1):
                assert time.monotonic() < deadline, "the two processes wait for each other"
        finally:
            for process in both.processes:
                process.kill()

    return run
