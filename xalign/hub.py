"""Models and datasets by their name on the Hugging Face hub, through its client and its cache; no network without a name.

The client is an extra (`pip install 'xalign[hf]'`) and finds its settings itself (HF_HOME, HF_TOKEN, HF_HUB_OFFLINE).
"""

import re
from collections.abc import Callable
from glob import escape
from pathlib import Path, PurePosixPath
from typing import Any

from xalign.errors import CheckpointError, DataError, XalignError

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
DATASET = re.compile(rf"({NAME.pattern})(?::(?:([\w.-]+)/)?([\w.-]+))?", re.ASCII)
# of one split in several formats the first is taken
FORMATS = (".parquet", ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".txt", ".txt.gz")
NO_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json", "package.json"}

MODEL_FILES = ["*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*",
               "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template*"]
# Beside the weights lie other programs' copies of them: in folders (onnx/, original/), Mistral's own, adapters.
OTHER_WEIGHTS = ["*/*", "consolidated*", "adapter_model*"]
PICKLES = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]


def is_hub_name(text: str) -> bool:
    """Whether `text` can only mean a repository: `owner/name`, not the name of a data file, and no such path here."""
    a_file = text.endswith((*FORMATS, ".gz", ".safetensors", ".bin"))
    return bool(NAME.fullmatch(text)) and not a_file and not Path(text).exists()


def model_folder(name: str, revision: str | None = None, *, allow_pickle: bool = False) -> Path:
    """The cache's folder of the model `owner/name`, downloaded where it is not there yet; never to be written into.

    `revision` is a branch, tag or commit. Pickled weights come only with `allow_pickle`, and where there are no others.
    Raises `CheckpointError`, one line, for everything that can go wrong.
    """
    client = _client(name, CheckpointError)

    def snapshot(patterns: list[str]) -> Path:
        return Path(client.snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=OTHER_WEIGHTS))

    folder = _ask(lambda: snapshot(MODEL_FILES), name, "model", revision, CheckpointError)
    if allow_pickle and not any(folder.glob("*.safetensors")):
        return _ask(lambda: snapshot([*MODEL_FILES, *PICKLES]), name, "model", revision, CheckpointError)
    return folder


def dataset_files(name: str) -> list[Path]:
    """The files of one split of the dataset `owner/name`, `owner/name:split` or `owner/name:config/split`, in order.

    Without a split it is `train`, else `train_prefs`, else the only one. Configurations and splits are read off the files'
    names (`config/train-00000-of-00002.parquet`, `data/test.jsonl`). Raises `DataError`, one line, for everything that can go
    wrong; it lists the splits where none or several fit.
    """
    if not (parts := DATASET.fullmatch(name)):
        raise DataError(f"{name}: no name of a dataset, allowed is owner/name, owner/name:split or owner/name:config/split")
    repo, config, split = parts.groups()
    client = _client(repo, DataError)

    def here() -> Path:  # what the cache has; no patterns, so nothing is missing
        return Path(client.snapshot_download(repo, repo_type="dataset", allow_patterns=[], local_files_only=True))

    def listing() -> list[str]:
        try:
            # not list_repo_files, which without a network tries again for 23 s
            return [file.rfilename for file in client.HfApi().dataset_info(repo).siblings or ()]
        except client.errors.HfHubHTTPError:
            raise
        except Exception:  # no network, in the words of whichever HTTP library the client uses: the cache may do
            folder = here()
            return [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]

    splits = _splits(_ask(listing, repo, "dataset", None, DataError))
    chosen = splits[_choose(name, config, split, splits)]

    def download() -> Path:
        return Path(client.snapshot_download(repo, repo_type="dataset", allow_patterns=[escape(file) for file in chosen]))

    folder = _ask(download, repo, "dataset", None, DataError)
    return [folder / file for file in chosen]


def _splits(files: list[str]) -> dict[tuple[str, str], list[str]]:
    """(configuration, split) -> its files in one format, for the files of a dataset's repository."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for file in sorted(files):
        path = PurePosixPath(file)
        kind = next((f for f in sorted(FORMATS, key=len, reverse=True) if path.name.endswith(f)), None)
        if kind is None or path.name in NO_DATA or any(part.startswith(".") for part in path.parts):
            continue
        split = re.sub(r"-\d+-of-\d+(-[0-9a-f]+)?$", "", path.name.removesuffix(kind))
        config = "/".join(part for part in path.parts[:-1] if part != "data")
        found.setdefault((config, split), {}).setdefault(kind, []).append(file)
    return {key: kinds[min(kinds, key=FORMATS.index)] for key, kinds in found.items()}


def _choose(name: str, config: str | None, split: str | None, splits: dict[tuple[str, str], list[str]]) -> tuple[str, str]:
    """The one (configuration, split) that is meant."""
    fitting = [key for key in splits if config in (None, key[0]) and split in (None, key[1])]
    for usual in ("train", "train_prefs") if split is None else ():
        if usual in (key[1] for key in fitting):
            fitting = [key for key in fitting if key[1] == usual]
            break
    if len(fitting) > 1:
        fitting = [key for key in fitting if key[0] in ("", "default")] or fitting
    if len(fitting) != 1:
        repo = name.partition(":")[0]
        there = ", ".join(f"{repo}:{c}/{s}" if c else f"{repo}:{s}" for c, s in fitting or splits)
        problem = f"{len(fitting)} splits fit" if fitting else "no such split"
        if not splits:
            raise DataError(f"{name}: no data there, allowed are files that end in one of {', '.join(FORMATS)}")
        raise DataError(f"{name}: {problem}, allowed is one of {there}")
    return fitting[0]


def _client(name: str, kind: type[XalignError]) -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise kind(f"{name}: no such file or folder, and the hub needs huggingface_hub: pip install 'xalign[hf]'") from error
    return huggingface_hub


def _ask(question: Callable[[], Any], name: str, what: str, revision: str | None, kind: type[XalignError]) -> Any:
    """The client's answer; whatever it raises becomes one line that says what to do."""
    try:
        return question()
    except Exception as error:
        raise kind(f"{name}: no such file or folder, and {_explain(error, name, what, revision)}") from error


def _explain(error: Exception, name: str, what: str, revision: str | None) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error.__cause__, errors.HfHubHTTPError):  # the client then says only that its cache lacks the thing
        error = error.__cause__
    first = (str(error).strip().splitlines() or [""])[0]
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError) or status == 403:
        page = f"https://huggingface.co/{'datasets/' if what == 'dataset' else ''}{name}"
        return f"on the hub this {what} is gated: ask for access at {page}, then `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"the hub has no such {what} (or a private one: `hf auth login`)"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"on the hub this {what} has no revision {revision!r}, allowed is a branch, a tag or a commit"
    if isinstance(error, errors.HfHubHTTPError) and status is not None:
        return f"the hub answers {status} ({first}): try again later"
    if isinstance(error, errors.HFValidationError):
        return f"the hub allows no such name ({first})"
    if constants.HF_HUB_OFFLINE:
        return f"the hub's cache lacks this {what}, or a part of it, and HF_HUB_OFFLINE is set: download it without"
    if isinstance(error, (errors.LocalEntryNotFoundError, ConnectionError)):
        return f"the hub can't be reached, and its cache lacks this {what} or a part of it: download it with a network"
    return f"the hub can't be used ({type(error).__name__}: {first})"
