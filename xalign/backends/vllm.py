"""vLLM in this process: all prompts at once. Its own draws: a seed is reproducible there, and gives other texts than ours."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

from xalign import sampling
from xalign.backends.base import Backend, Completion, Done, SamplingParams, failure
from xalign.backends.text import cut, fitted_ids, special_ids
from xalign.data.records import Text
from xalign.errors import ConfigError, DataError

ROUND = 4096  # prompts that vLLM gets at once: so many completions are on disk together, and its scheduler is full


class VLLMBackend(Backend):
    """`vllm.LLM`, tensor-parallel on several GPUs where asked for; `logprobs` asks for log-probabilities too.

    Written against vLLM's documented interface (LLM.generate with token prompts and a SamplingParams each, collective_rpc).
    """

    supports = frozenset(SamplingParams.__dataclass_fields__) - {"beams", "length_penalty"}

    def __init__(self, model: str, *, tensor_parallel_size: int = 1, dtype: str | None = None, device: str | None = None,
                 name: str | None = None, gpu_memory_utilization: float | None = None, max_model_len: int | None = None,
                 logprobs: bool = False, trust_remote_code: bool = False):
        try:
            import vllm
        except ImportError:
            raise ConfigError("the backend vllm needs it: pip install vllm (in an environment of its own)") from None
        if device is not None:
            raise ConfigError(f"device is {device}, allowed is none: vLLM is built for one kind of device")
        options = {"gpu_memory_utilization": gpu_memory_utilization, "max_model_len": max_model_len, "dtype": dtype}
        self.library, self.name, self.path, self.logprobs = vllm, name or model, model, logprobs
        try:
            self.llm = vllm.LLM(model=model, tensor_parallel_size=tensor_parallel_size, trust_remote_code=trust_remote_code,
                                **{k: v for k, v in options.items() if v is not None})
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(f"{model}: vLLM can't start ({' '.join(str(error).split())[:300]})") from error
        self.tokenizer = self.llm.get_tokenizer()
        self.context: int | None = self.llm.llm_engine.model_config.max_model_len

    def refresh(self, checkpoint: str) -> None:
        """The weights of another folder of the same shape, in place; cached prefixes of the old ones go."""
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": checkpoint})
        self.llm.reset_prefix_cache()
        self.path = checkpoint

    def mapped(self, params: SamplingParams, seed: int | None, left: int) -> Any:
        """vLLM's SamplingParams for a prompt that leaves room for `left` tokens."""
        return self.library.SamplingParams(
            n=params.n,
            temperature=params.temperature,
            top_k=0 if params.top_k is None else params.top_k,
            top_p=1.0 if params.top_p is None else max(params.top_p, 1e-6),
            min_p=params.min_p or 0.0,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            max_tokens=left,
            min_tokens=min(params.min_new_tokens, left),
            stop=list(params.stop) or None,
            stop_token_ids=special_ids(self.tokenizer, params.stop) or None,
            seed=seed,
            logprobs=0 if self.logprobs else None,
            skip_special_tokens=True,
        )

    def generate(self, prompts: Sequence[Text], params: SamplingParams, progress: str = "", *,
                 seeds: Sequence[int] | None = None, done: Done | None = None) -> list[list[Completion]]:
        """See `Backend.generate`; `done` is told after each round of prompts."""
        params = self.checked(params)
        results: list[list[Completion]] = [[] for _ in prompts]
        if seeds is None and params.seed is not None and prompts:
            seeds = sampling.row_keys(params.seed, len(prompts)).tolist()
        for start in range(0, len(prompts), ROUND):
            began, asked = time.monotonic(), []
            for i in range(start, min(start + ROUND, len(prompts))):
                try:
                    ids = fitted_ids(self.tokenizer, prompts[i], self.template, params, self.context)
                except DataError as error:
                    results[i] = [failure(str(error), self.name)] * params.n
                    continue
                left = params.max_new_tokens if self.context is None else min(params.max_new_tokens, self.context - len(ids))
                if left < 1:  # vLLM writes a token at least
                    results[i] = [Completion("", (), "length", 0.0, 0.0, self.name)] * params.n
                    continue
                asked.append((i, ids, self.mapped(params, None if seeds is None else seeds[i] % 2**63, left)))
            outputs = self.llm.generate([{"prompt_token_ids": ids} for _, ids, _ in asked], [given for _, _, given in asked],
                                        use_tqdm=bool(progress)) if asked else []
            for (i, _, _), output in zip(asked, outputs, strict=True):
                results[i] = [self._completion(o, params, time.monotonic() - began) for o in output.outputs]
            for i in range(start, min(start + ROUND, len(prompts))):
                if done is not None:
                    done(i, results[i])
        return results

    def _completion(self, output: Any, params: SamplingParams, seconds: float) -> Completion:
        text, ended = cut(output.text, params.stop, output.finish_reason == "stop")
        return Completion(text, tuple(output.token_ids), "stop" if ended else "length", output.cumulative_logprob, seconds,
                          self.name)

    def stream(self, prompt: Text, params: SamplingParams) -> Iterator[str]:
        """The whole text in one piece: vLLM's in-process interface has no other."""
        (completion,), = self.generate([prompt], params)
        if completion.error:
            raise DataError(completion.error)
        self.ended = completion.finish_reason == "stop"
        yield completion.text

    def close(self) -> None:
        del self.llm
