import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SHORT = [
    (r"epochs=200", "epochs=2, progress=False"),
    (r"steps=4000", "steps=200, progress=False"),
    (r"num_samples=1000", "num_samples=5"),
    (r"steps=2000", "steps=20, progress=False"),
    (r"\(4, 8, 16\)", "(1, 2)"),
]


@pytest.mark.parametrize("number", range(4))
def test_every_python_block_runs(number, tmp_path, monkeypatch):
    block = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[number]
    for long, short in SHORT:
        block = re.sub(long, short, block)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        exec(compile(block, f"README block {number}", "exec"), {"__name__": "readme"})
    finally:
        torch.set_num_threads(threads)


def test_there_are_four_python_blocks_and_their_long_runs_are_shortened():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 4
    assert all(re.search(long, README) for long, _ in SHORT)


def test_commands_of_the_readme_exist():
    from pgen.cli import app

    blocks = "".join(block for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL))
    names = {command.callback.__name__ for command in app.registered_commands}
    assert set(re.findall(r"\bpgen (\w+)", blocks)) == names


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_check_of_continuous_integration_is_the_readmes():
    assert "make test" in README
    assert "make test" in (ROOT / ".ci" / "run").read_text()
