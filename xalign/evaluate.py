"""`xalign evaluate`: a policy against its reference, from models, pairs and judges to figures and a report.

What costs time is kept piece by piece in the run's folder (`journal.Journal`): samples as they come, log-probabilities and
judgements part by part. The same command goes on there, and with other judges it samples nothing again.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from xalign import sampling, verdicts
from xalign.backends.base import Completion, SamplingParams
from xalign.collect import as_json
from xalign.compared import Side, files_of, read, same_ids, slug, weights_digest
from xalign.complete import as_prompt
from xalign.config import flatten
from xalign.data import toyworld
from xalign.data.collate import EncodedPair
from xalign.data.records import PreferencePair, Text
from xalign.data.sources import read_prompts
from xalign.errors import ConfigError, DataError
from xalign.evaluate_config import EvaluateConfig
from xalign.evaluation import figures, metrics
from xalign.evaluation.compare import fitting
from xalign.evaluation.figures import Comparison, Section
from xalign.evaluation.intervals import WinRate, all_wins, differences, win_rate
from xalign.evaluation.pictures import draw_evaluation
from xalign.evaluation.report import write
from xalign.journal import Journal
from xalign.nn.transformer import TransformerWrapper
from xalign.prepare import data_digest, encode_pairs, in_memory, say, watched_text
from xalign.rewardbench import name_of
from xalign.runs import RunFolder, read_json
from xalign.stages import choose_device, is_toy
from xalign.tokenizers import Tokenizer
from xalign.watch import warn

EVALUATION, REPORT, SAMPLES = "evaluation.json", "report.md", "samples.jsonl"
NAMES = ("reference", "policy")
# settings that may differ when a run goes on: they change no sample and no log-probability
FREE = ("output_dir", "overwrite", "batch_size", "device", "judge", "judge_max_new_tokens", "eval_text", "perplexity_alert")
ASKED = ("judge", "judge_max_new_tokens", "eval_text", "perplexity_alert")


def run_evaluate(config: EvaluateConfig) -> None:
    """Check, sample, score, judge, report; prints the table."""
    compared, options = config.compared, config.run
    reference = compared.ref_model or str(Path(compared.model).parent / "reference")
    if compared.ref_model is None and not Path(reference).is_dir():
        raise ConfigError(f"--ref-model is not given and there is no {reference}, allowed is a model to compare with")
    specs = {"reference": reference, "policy": compared.model}
    files = files_of(config)
    pairs, sources, lost = read(config, files)
    prompts = [p.prompt for p in pairs]
    if config.data.prompts:
        prompts = [as_prompt(p, config.data, f"{config.data.prompts}: prompt {i}")
                   for i, p in enumerate(read_prompts(config.data.prompts), 1)]
    judges = tuple(dict.fromkeys(config.judges.judge)) or (("gold",) if is_toy(prompts) else ())
    for judge in judges:
        verdicts.check(judge, compared.allow_pickle)
    if "gold" in judges and not is_toy(prompts):
        raise ConfigError("--judge gold knows only the toy world's prompts, and these are others")
    if config.judges.against == "chosen" and (config.data.prompts or not pairs):
        raise ConfigError("--against chosen goes with a --dataset of pairs and their own prompts")
    for temperature in config.judges.temperatures:
        SamplingParams(temperature=temperature)
    text = config.evaluation.eval_text
    asked = {k: list(v) if isinstance(v, tuple) else v for k, v in flatten(config).items() if k in ASKED}
    asked |= {"text_sha256": data_digest([text] if text else []), "judges": [slug(judge) for judge in judges]}
    with RunFolder(options.output_dir or Path("runs/evaluate") / (options.run_name or name_of(compared.model))) as run:
        settings = {k: list(v) if isinstance(v, tuple) else v for k, v in flatten(config).items() if k not in FREE}
        read_files = [*files, *([config.data.prompts] if config.data.prompts else [])]
        run.claim({"program": "evaluate", **settings, "ref_model": reference, "data_sha256": data_digest(read_files),
                   "weights_sha256": [weights_digest(spec) for spec in specs.values()]}, options.overwrite)
        human = any(judge.startswith("human:") for judge in judges)
        if (run.path / REPORT).exists() and not human and read_json(run.path / EVALUATION).get("asked") == asked:
            say(f"{run.path} is finished (--overwrite evaluates anew). From its report:")
            print((run.path / REPORT).read_text(encoding="utf-8").split("## Pictures")[0].strip())
            return
        sides = {name: Side(spec, compared) for name, spec in specs.items()}
        try:
            work = Evaluation(config, run.path, sides, pairs, sources, prompts, judges)
            work.measure()
        finally:
            for side in sides.values():
                side.backend.close()
        work.result.numbers |= {"asked": asked, "left_out": lost}
        work.notes += [f"{told}." for told in lost]
        title = f"{compared.model} against {reference if config.judges.against == 'reference' else 'the chosen replies'}"
        pictures = draw_evaluation(run.path, work.result)
        print(write(run.path, title, work.result, work.notes, pictures, {**flatten(config), "ref_model": reference}))
        say(f"report: {run.path / 'report.html'} and {run.path / REPORT}")


class Evaluation:
    """The stages of an evaluation, in a folder; `result` and `notes` are what the report shows."""

    def __init__(self, config: EvaluateConfig, folder: Path, sides: dict[str, Side], pairs: Sequence[PreferencePair],
                 sources: dict[str, str], prompts: Sequence[Text], judges: Sequence[str]):
        self.config, self.folder, self.sides, self.judges = config, folder, sides, judges
        self.pairs, self.sources, self.result, self.notes = pairs, sources, Comparison(), list[str]()
        self.texts: dict[tuple[str, float], list[list[Completion]]] = {}
        options = config.evaluation
        self.temperatures = sorted({1.0, *config.judges.temperatures})
        kept, too_long = list({str(p): p for p in prompts}.values()), 0
        for side in sides.values():
            if side.model is not None and side.tokenizer is not None:
                fit, long = fitting(kept, side.tokenizer, side.model.max_seq_len - options.eval_max_new_tokens, len(kept))
                kept, too_long = fit, too_long + long
        self.result.prompts = kept[: options.eval_prompts]
        self.result.numbers |= {"prompts": len(self.result.prompts), "prompts_too_long": too_long,
                                "samples": options.eval_samples}
        if not self.result.prompts:
            raise ConfigError(f"no prompt leaves room for --eval-max-new-tokens {options.eval_max_new_tokens} in the models' "
                              "window, allowed are fewer")
        policy, reference = sides["policy"], sides["reference"]
        self.window = min((s.model.max_seq_len for s in sides.values() if s.model is not None), default=0)
        self.scored = (policy.tokenizer is not None and reference.tokenizer is not None
                       and same_ids(policy.tokenizer, reference.tokenizer, kept))
        if not self.scored:
            self.notes.append("KL, log-ratios and perplexities are left out: they need two models of xalign's own engine with "
                              "the same tokenizer.")

    def measure(self) -> None:
        """All that can be known of the two, in the order of the table."""
        if self.scored:
            self.pairs_figures()
            self.text_figures()
        self.sample()
        for name in NAMES:
            figures.add_texts(self.result, name, self.texts[name, 1.0])
        if self.scored:
            self.divergence()
        for judge in self.judges:
            self.judged(judge)
        if is_toy(self.result.prompts):
            figures.add_gold(self.result, self.pairs)
        self._describe()

    # -- likelihoods

    def pairs_figures(self) -> None:
        """Perplexity of held-out responses, log-ratios and the alignment inequality."""
        if not self.pairs:
            return
        options = self.config.data
        encoded: list[EncodedPair] = in_memory(
            encode_pairs, self.pairs, self.sides["policy"].own[1], min(options.max_length or self.window, self.window),
            options.truncation_mode, "held out pairs")
        self.result.numbers["pairs"] = len(encoded)
        logps = self._logps("pairs.jsonl", len(encoded), lambda model, tokenizer, rows: metrics.sides_logps(
            model, [encoded[i] for i in rows], tokenizer.pad_id)[0])
        by_where = {pair.where: pair for pair in self.pairs}
        kept = [by_where[row.where] for row in encoded]
        tokens = np.array([[len(row.chosen), len(row.rejected)] for row in encoded]).T
        for name in NAMES:
            figures.add_perplexity(self.result, "held-out responses", name, "perplexity", -logps[name].sum(0), tokens.sum(0))
        gold: list[float] = []
        if is_toy(p.prompt for p in kept):
            gold = [toyworld.gold_reward(str(p.prompt), str(p.chosen)) - toyworld.gold_reward(str(p.prompt), str(p.rejected))
                    for p in kept]
        figures.add_log_ratios(self.result, logps["policy"], logps["reference"], tokens, [str(p.prompt) for p in kept],
                               [self.sources[p.where] for p in kept], gold)

    def text_figures(self) -> None:
        """Perplexity of --eval-text, and the alarm."""
        file = self.config.evaluation.eval_text
        if file is None:
            return
        examples = watched_text(file, self.sides["policy"].own[1], self.window)
        part = f"text-{data_digest([file])}.jsonl"
        logps = self._logps(part, len(examples), lambda model, tokenizer, rows: np.array(
            [metrics.example_logps(model, [examples[i] for i in rows], tokenizer.pad_id)[0]]))
        tokens = [float(sum(e.loss_mask[1:])) for e in examples]
        warn(figures.add_text(self.result, Path(file).name, {name: logps[name][0].tolist() for name in NAMES}, tokens,
                              self.config.evaluation.perplexity_alert))

    def divergence(self) -> None:
        """KL and entropies of the samples at temperature 1."""
        prompts, drawn = self.result.prompts, self.texts["policy", 1.0]
        logps = self._logps("kl.jsonl", len(prompts), lambda model, tokenizer, rows: np.array(
            metrics.completion_logps(model, tokenizer, [prompts[i] for i in rows], [drawn[i] for i in rows])).T)
        own = [[c.logps or 0.0 for c in row] for row in self.texts["reference", 1.0]]
        figures.add_divergence(self.result, logps["policy"].T.tolist(), logps["reference"].T.tolist(), own)

    def _logps(self, file: str, rows: int,
               score: Callable[[TransformerWrapper, Tokenizer, list[int]], np.ndarray]) -> dict[str, np.ndarray]:
        """(values, rows) of each model, by parts that are kept in `file`; `score` gives (values, rows) of some rows."""
        found = {}
        with Journal(self.folder / file, rows, len(NAMES)) as kept:
            for slot, name in enumerate(NAMES):
                def work(part: list[int], name: str = name) -> list[dict[str, Any]]:
                    return [{"model": name, "logps": row.tolist()} for row in score(*self.sides[name].own, part).T]

                kept.fill(slot, work, f"score by the {name}")
                found[name] = np.array([kept.record(row, slot)["logps"] for row in range(rows)]).T
        return found

    # -- samples

    def sample(self) -> None:
        """Samples of both models at each temperature; each prompt's are on disk as soon as they are there."""
        prompts = self.result.prompts
        slots = [(name, t) for t in self.temperatures for name in NAMES]
        with Journal(self.folder / SAMPLES, len(prompts), len(slots)) as kept:
            for slot, (name, t) in enumerate(slots):
                missing = np.flatnonzero(kept.missing[:, slot]).tolist()
                if missing:
                    self._draw(kept, slot, name, t, missing)
                rows = [kept.record(row, slot) for row in range(len(prompts))]
                self.texts[name, t] = [[Completion(c["text"], tuple(c["tokens"]), c["finish_reason"], c["logps"])
                                        for c in row["completions"]] for row in rows]

    def _draw(self, kept: Journal, slot: int, name: str, temperature: float, missing: list[int]) -> None:
        options, prompts = self.config.evaluation, self.result.prompts
        seed = self.config.run.seed + (name == "policy")  # equal models must tie over all samples, not give the same texts
        keys = sampling.row_keys(seed, len(prompts)).tolist()
        params = SamplingParams(temperature=temperature, n=options.eval_samples if temperature else 1,
                                max_new_tokens=options.eval_max_new_tokens, seed=seed)
        failures: list[str] = []

        def keep(i: int, completions: list[Completion]) -> None:
            errors = [c.error for c in completions if c.error is not None]
            failures.extend(errors[:1])
            record = {"model": name, "temperature": temperature, "prompt": as_json(prompts[missing[i]]), "completions": [
                {"text": c.text, "tokens": list(c.token_ids), "finish_reason": c.finish_reason, "logps": c.logps}
                for c in completions]}
            kept.add(missing[i], slot, bool(errors), record | ({"error": errors[0]} if errors else {}))

        self.sides[name].backend.generate([prompts[i] for i in missing], params, f"sample {name} at {temperature:g}",
                                          seeds=[keys[i] for i in missing], done=keep)
        if failures:
            raise DataError(f"{name}: {len(failures)} of {len(missing)} prompts failed ({failures[0]}); the same command asks "
                            "for these again")

    # -- who wins

    def judged(self, judge: str) -> None:
        """One judge's comparisons at each temperature, and its scores where it gives any."""
        label = "gold reward" if judge == "gold" else judge
        human, paired = judge.startswith("human:"), judge.partition(":")[0] in verdicts.PAIRED
        names = ("policy",) if human or self.config.judges.against == "reference" else NAMES
        temperatures = [1.0] if human else self.temperatures
        wins = self._pair_wins(judge, names, temperatures) if paired else self._score_wins(judge, label, names, temperatures)
        found: dict[float, dict[str, WinRate]] = {}
        for t in temperatures:
            for name in names:
                rows, lengths = wins[name, t]
                if any(rows):
                    found.setdefault(t, {})[name] = win_rate(rows, lengths)
        if not any(wins["policy", 1.0][0]):
            self.notes.append(f"{judge}: nothing is judged yet.")
            return
        figures.add_wins(self.result, label, *wins["policy", 1.0])
        if "reference" in names:
            self.result.add(f"win rate by {label}", "reference", found[1.0]["reference"].rate)
            self.result.numbers["win_rates"][label]["reference"] = figures.as_json(found[1.0]["reference"])
        self.result.temperatures[label] = found
        self.result.numbers["win_rates"][label]["temperatures"] = {
            f"{t:g}": {name: figures.as_json(w) for name, w in at.items()} for t, at in found.items()}

    def opponents(self, temperature: float) -> list[list[str]]:
        """What the samples at a temperature are compared with, for each prompt."""
        if self.config.judges.against == "reference":
            return self.texts_of("reference", temperature)
        chosen: dict[str, list[str]] = {}
        for pair in self.pairs:
            chosen.setdefault(str(pair.prompt), []).append(
                pair.chosen if isinstance(pair.chosen, str) else pair.chosen[0].content)
        return [chosen[str(prompt)] for prompt in self.result.prompts]

    def texts_of(self, name: str, temperature: float) -> list[list[str]]:
        return [[c.text for c in row] for row in self.texts[name, temperature]]

    def _score_wins(self, judge: str, label: str, names: Sequence[str],
                    temperatures: Sequence[float]) -> dict[tuple[str, float], tuple[list[list[float]], list[list[float]]]]:
        """Every reply is scored once, and compared with every one of the other side."""
        against = self.config.judges.against
        slots = [(name, t) for t in temperatures for name in NAMES] + ([("chosen", 1.0)] if against == "chosen" else [])
        texts = {slot: self.opponents(1.0) if slot[0] == "chosen" else self.texts_of(*slot) for slot in slots}
        prompts, options = self.result.prompts, self.config.compared
        scorer = cache(lambda: verdicts.open_scorer(judge, dtype=options.dtype, device=choose_device(options.device),
                                                    batch_size=options.batch_size))
        scores = {}
        with Journal(self.folder / f"judged-{slug(judge)}.jsonl", len(prompts), len(slots)) as kept:
            for place, slot in enumerate(slots):
                def work(part: list[int], slot: tuple[str, float] = slot) -> list[dict[str, Any]]:
                    told = [(prompts[i], text) for i in part for text in texts[slot][i]]
                    flat = iter(scorer().score([p for p, _ in told], [t for _, t in told]).tolist())
                    return [{"model": slot[0], "temperature": slot[1], "scores": [next(flat) for _ in texts[slot][i]]}
                            for i in part]

                kept.fill(place, work, f"{label}: {slot[0]} at {slot[1]:g}")
                scores[slot] = [kept.record(row, place)["scores"] for row in range(len(prompts))]
        figures.add_scores(self.result, label, {name: scores[name, 1.0] for name in NAMES})
        found = {}
        for t in temperatures:
            for name in names:
                other = ("chosen", 1.0) if against == "chosen" else ("reference", t)
                found[name, t] = (all_wins(scores[name, t], scores[other]),
                                  differences(figures.chars(texts[name, t]), figures.chars(texts[other])))
        return found

    def _pair_wins(self, judge: str, names: Sequence[str],
                   temperatures: Sequence[float]) -> dict[tuple[str, float], tuple[list[list[float]], list[list[float]]]]:
        """Replies are compared one with one, by a judge that sees both."""
        options, prompts = self.config.compared, self.result.prompts
        slots = [(name, t) for t in temperatures for name in names]
        opened = cache(lambda: verdicts.open_pair_judge(
            judge, seed=self.config.run.seed, max_new_tokens=self.config.judges.judge_max_new_tokens,
            batch_size=options.batch_size, dtype=options.dtype, device=options.device, allow_pickle=options.allow_pickle))
        found, answers = {}, list[dict[str, Any]]()
        human = judge.startswith("human:")
        path = self.folder / f"judged-{slug(judge, self.config.judges.judge_max_new_tokens)}.jsonl"
        with Journal(path, len(prompts), len(slots)) as kept:
            for place, slot in enumerate(slots):
                ours, theirs = self.texts_of(*slot), self.opponents(slot[1])

                def work(part: list[int], slot: tuple[str, float] = slot, ours: list[list[str]] = ours,
                         theirs: list[list[str]] = theirs) -> list[dict[str, Any]]:
                    rows = opened().wins([prompts[i] for i in part], [ours[i] for i in part], [theirs[i] for i in part], part)
                    return [{"model": slot[0], "temperature": slot[1], **row} for row in rows]

                if human:  # whose sheet may have been filled in since
                    rows = work(list(range(len(prompts))))
                else:
                    kept.fill(place, work, f"{judge}: {slot[0]} at {slot[1]:g}")
                    rows = [kept.record(row, place) for row in range(len(prompts))]
                answers += rows
                lengths = [[float(len(a) - len(b)) for a, b in verdicts.matched(x, y)][: len(row["wins"])]
                           for x, y, row in zip(ours, theirs, rows, strict=True)]
                found[slot] = ([row["wins"] for row in rows], lengths)
        self._agreement(judge, answers)
        return found

    def _agreement(self, judge: str, answers: Sequence[dict[str, Any]]) -> None:
        """How often both orders gave the same winner, and no verdict at all, of a language model."""
        both = [[one[0] for one in pair] for row in answers for pair in row.get("verdicts", [])]
        if both:
            told = [pair for pair in both if None not in pair]
            same = sum(a == b for a, b in told) / len(told) if told else math.nan
            none = sum(v is None for pair in both for v in pair) / (2 * len(both))
            self.result.numbers.setdefault("judges", {})[judge] = {"orders_agree": same, "no_verdict": none}
            agree = (f"they agree in {same:.1%} of the {len(told):,} comparisons with two verdicts" if told
                     else "no comparison got two verdicts")
            self.notes.append(f"{judge} was asked in both orders: {agree}; {none:.1%} of its answers hold no verdict and count "
                              "one half.")
            if none > 0.5:
                alert = f"{none:.1%} of {judge}'s answers hold no verdict, so its win rate says little"
                self.result.alerts.append(alert)
                warn(alert)

    def _describe(self) -> None:
        """Notes on what the figures are, and the table of temperatures."""
        options, result = self.config.evaluation, self.result
        what = "the reference's" if self.config.judges.against == "reference" else "the data set's chosen replies"
        self.notes.insert(0, f"Samples are drawn for {len(result.prompts):,} prompts, {options.eval_samples} each by either "
                          "model at temperature 1, unfiltered. In brackets: 95 % intervals over prompts (bootstrap; of the "
                          "win rate at equal lengths a cluster-robust Wald interval). "
                          f"The win rate compares the policy's with {what}; a tie counts one half.")
        if "kl_standard_error" in result.numbers:
            self.notes.append(f"KL: {result.numbers['kl']:.3f} nats, Monte-Carlo standard error "
                              f"{result.numbers['kl_standard_error']:.3f} (of drawing samples, these prompts given).")
        if result.numbers["prompts_too_long"]:
            self.notes.append(f"{result.numbers['prompts_too_long']:,} prompts leave no room for "
                              f"{options.eval_max_new_tokens} tokens and are left out.")
        if "preference_accuracy_limit" in result.numbers:
            self.notes.append("Labels are noisy: knowing the gold reward itself, the share of pairs would be "
                              f"{result.numbers['preference_accuracy_limit']:.3f}.")
        if len(self.temperatures) > 1 and result.temperatures:
            rows = [[judge, f"{t:g}", name, str(w.rate), str(w.controlled)] for judge, at in result.temperatures.items()
                    for t, by_name in at.items() for name, w in by_name.items()]
            result.sections.append(Section("Win rate against temperature", ["judge", "temperature", "model", "win rate",
                                                                            "at equal lengths"], rows,
                                           "Both models sample at the temperature; at 0 they are greedy, one text a prompt."))
