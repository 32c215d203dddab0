"""The floors of docs/design.md: a module imports only from the lines above it, and names cost nothing until used."""

import ast
import io
import subprocess
import sys
import tokenize
from dataclasses import is_dataclass
from pathlib import Path

import pytest

from xalign import cli

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "xalign"

# One line a floor. The modules of a line may not import one another, unless the line says "in order".
FLOORS = [
    "errors",
    "disk",
    "sampling stopping logprobs optim distributed hub",
    "drawing",
    "losses",
    "tokenizer_base",
    "tokenizer_json",
    "tokenizers",
    "data.records",
    "data.files",
    "data.shapes",
    "data.sources",
    "data.chat_template",
    "data.collate",
    "data.store",
    "data.toywords",
    "data.toyworld",
    "nn.products nn.rotary nn.cache",
    "nn.linear",
    "nn.attention",
    "nn.branches",
    "nn.transformer",
    "nn.decoding",
    "nn.engine",
    "nn.autoregressive",
    "nn.reward nn.quantize",
    "nn.lora",
    "dpo",
    "families",
    "hf",
    "weights",
    "checkpoint",
    "sharding",
    "runs",
    "objectives watch",
    "training",
    "backends.base",
    "backends.native",
    "evaluation.intervals",
    "evaluation.metrics",
    "data.replies pairing",
    "scoring",
    "evaluation.figures",
    "evaluation.compare evaluation.page exact",
    "evaluation.report evaluation.judge evaluation.rewardbench",
    "evaluation.rewards evaluation.pictures evaluation.rounds",
    "config",
    "score_config evaluate_config generate_config grids",
    "online_config",
    "flags",
    "display",
    "inspection",
    "prepare",
    "stages reference adapters",
    "formats",
    "backends.text",
    "backends.dialects",
    "backends.transformers backends.vllm backends.openai",
    "backends.opening",
    "principles journal",
    "plan",
    "collect_config",
    "collect",
    "judge",
    "annotate",
    "binarize",
    "memory",
    "checks",
    "rehearsal",
    "train",
    "train_reward",
    "loading chat console",
    "repl",
    "complete",
    "serve",
    "score",
    "rewardbench",
    "verdicts compared harness",
    "evaluate",
    "rounds",
    "online",
    "trials",
    "ablation_report",
    "ablate",
    "cli",
    "__main__",
]
FLOOR = {module: i for i, line in enumerate(FLOORS) for module in line.split()}
HEAVY = ("torch", "transformers", "matplotlib", "sentencepiece", "numpy", "wandb", "safetensors")


def modules() -> dict[str, Path]:
    """Every module with code, by its name below the package."""
    return {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in sorted(PACKAGE.rglob("*.py"))
            if p.name != "__init__.py"}


def imported(path: Path, source: str | None = None) -> list[tuple[int, str]]:
    """(line, module below the package) of each import of ours, also of those inside functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8") if source is None else source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # `from xalign import sampling` means a module, `from xalign.errors import ConfigError` a name in one
            base = ".".join(("xalign", *path.relative_to(PACKAGE).parts)[: -node.level]) if node.level else ""
            names = [".".join(part for part in (base, node.module, alias.name) if part) for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "xalign":
                prefixes = (".".join(parts[1:n]) for n in range(len(parts), 1, -1))
                found += [(node.lineno, p) for p in prefixes if p in modules()][:1]
    return found


def test_every_module_has_a_floor():
    assert set(modules()) <= set(FLOOR), "give the new module its line in FLOORS (and in docs/design.md)"


@pytest.mark.parametrize("module", modules())
def test_imports_only_from_the_floors_below(module):
    for line, other in imported(modules()[module]):
        assert FLOOR[other] < FLOOR[module], f"xalign/{module.replace('.', '/')}.py:{line} imports {other}: a step upward"


def test_the_walk_sees_imports_of_every_form():
    source = ("import xalign.dpo\nfrom xalign import sampling\nfrom xalign.nn.cache import Cache\nfrom . import decoding\n"
              "from ..hf import to_hf\ndef f():\n    from xalign.errors import nearest\n    from xalign import __version__\n")
    assert imported(PACKAGE / "nn" / "m.py", source) == [(1, "dpo"), (2, "sampling"), (3, "nn.cache"), (4, "nn.decoding"),
                                                         (5, "hf"), (7, "errors")]


def test_the_package_itself_imports_nothing_of_ours():
    for path in PACKAGE.rglob("__init__.py"):
        assert imported(path) == []


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_import_xalign_loads_nothing_heavy():
    assert run_python(f"import sys, xalign; print([m for m in {HEAVY} if m in sys.modules])").strip() == "[]"


def test_every_public_name_is_there():
    code = "import xalign\nfor name in xalign.__all__: getattr(xalign, name)\nprint(dir(xalign))"
    assert "load_pretrained" in run_python(code)


@pytest.mark.parametrize("arguments", ["dpo --help", "sft --help", "generate --help", "--help", "--version", "nonsense",
                                       "dpo --bata 1", "dpo --print-config", "data inspect --help", "score --help",
                                       "rewardbench --help", "reward --help", "collect --help", "annotate --help",
                                       "binarize --help", "chat --help", "evaluate --help", "online --help", "ablate --help"])
def test_help_and_mistakes_load_nothing_heavy(arguments):
    code = ("import sys\nfrom xalign.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
            f"loaded = [m for m in {HEAVY} if m in sys.modules]\nassert not loaded, loaded")
    done = subprocess.run([sys.executable, "-c", code, *arguments.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_command_names_settings_and_a_function_that_exist():
    for program in cli.COMMANDS.values():
        if not isinstance(program, cli.Harness):
            assert is_dataclass(cli._named(program.settings)) and callable(cli._named(program.run))


@pytest.mark.parametrize("program", ["train_dpo.py", "generate.py"])
def test_help_of_the_scripts_names_groups_and_defaults(program):
    done = subprocess.run([sys.executable, program, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    flag, group = ("--beta", "loss options") if program == "train_dpo.py" else ("--temperature", "sampling options")
    for part in (program, "(default:", flag, group):
        assert part in done.stdout


def code_lines(path: Path) -> int:
    """Lines that hold code: neither blank, nor comment, nor docstring."""
    source = path.read_text(encoding="utf-8")
    lines: set[int] = set()
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return len(lines)


def test_the_core_is_small_enough_to_hold_in_mind():
    """Up to and including the engine floor; the programs stand on top, and the embedded world is a dataset (docs/design.md)."""
    core = [p for m, p in modules().items() if FLOOR[m] < FLOOR["evaluation.intervals"] and not m.startswith("data.toy")]
    assert 1000 < sum(code_lines(p) for p in core) < 6700
