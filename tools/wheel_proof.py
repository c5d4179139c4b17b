"""Run inside a clean environment: every module imports, the command answers, the shipped pocket loads."""

import importlib
import importlib.util
import pkgutil
import subprocess
import sys
from pathlib import Path

DEVELOPMENT = ("nbdev", "fastcore", "execnb", "pytest", "jupytext", "nbformat", "ruff")


def main() -> None:
    """Print what works; stop at the first thing that does not."""
    present = [name for name in DEVELOPMENT if importlib.util.find_spec(name)]
    assert not present, f"this environment is not clean: {present}"
    package = importlib.import_module("vlm_reward")
    assert Path(sys.prefix) in Path(package.__file__).parents, f"the package comes from {package.__file__}"
    names = [module.name for module in pkgutil.walk_packages(package.__path__, "vlm_reward.")]
    for name in names:
        importlib.import_module(name)
    print(f"{len(names)} modules import")
    command = Path(sys.prefix, "bin", "vlm-reward")
    answer = subprocess.run([command, "--help"], capture_output=True, text=True, check=True).stdout
    assert "study" in answer, answer
    print(answer.splitlines()[0])
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = importlib.import_module("vlm_reward.policy.pocket").pocket_folder()
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    print(f"{type(model).__name__} of {model.num_parameters() / 1e6:.2f} M, {type(processor).__name__}")


if __name__ == "__main__":
    main()
