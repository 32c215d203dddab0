"""What the README promises: its research script runs as printed, and its commands exist."""

import contextlib
import io
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_research_script_aligns_and_talks():
    script = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(compile(script, "README.md", "exec"), {})
    before, after = (float(x) for x in re.search(r"log-ratio: (\S+) before, (\S+) after", shown.getvalue()).groups())
    assert after > before + 5
    assert "tensor" in shown.getvalue()


def test_every_make_target_and_flag_of_the_readme_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\S+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    settings = [*(ROOT / "xalign").glob("*config.py"), ROOT / "xalign" / "grids.py"]
    known = "".join(path.read_text(encoding="utf-8") for path in settings)
    for flag in set(re.findall(r"--([a-z][a-z0-9-]+)", README)) - {"help", "config", "print-config", "nproc-per-node"}:
        assert re.search(rf"\b{flag.removeprefix('no-').replace('-', '_')}\b", known), flag
