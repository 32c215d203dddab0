"""How models without a chat template are spoken to, as data: a template, what ends an answer, and what is trimmed.

The formats are those of UltraFeedback's pool. There the principle is glued to the next word, or lands outside the system turn,
or is lost, in llama-2, falcon and wizardlm-7b, and UltraLM's turns run together: here the principle is part of the system text,
and blanks stand where the models were trained with them. `</s>` is removed as a suffix, never as a set of characters.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """`template` is jinja over messages (None: the model's own); `system` the system text that the model was trained with.

    `stop` are strings that end an answer, `closers` what a decoder may leave at its end.
    """

    template: str | None = None
    system: str = ""
    stop: tuple[str, ...] = ()
    closers: tuple[str, ...] = ("</s>",)
    text: bool = False
    """The prompt is continued as it is: there is no place for a system text, and the answer's first blank belongs to it."""


def _turns(system: str, user: str, assistant: str, prompt: str, bare: str = "") -> str:
    """A template of these pieces; {} is the message's content. `bare` stands in front where there is no system turn."""
    def piece(form: str) -> str:
        before, _, after = form.partition("{}")
        return f"{{{{ {before!r} + message.content + {after!r} }}}}"

    return ("{% if messages and messages[0].role != 'system' %}" f"{{{{ {bare!r} }}}}" "{% endif %}"
            "{% for message in messages %}"
            f"{{% if message.role == 'system' %}}{piece(system)}{{% elif message.role == 'user' %}}{piece(user)}"
            f"{{% else %}}{piece(assistant)}{{% endif %}}" "{% endfor %}"
            f"{{% if add_generation_prompt %}}{{{{ {prompt!r} }}}}{{% endif %}}")


_VICUNA = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
           "and polite answers to the user's questions.")
_ALPACA = ("Below is an instruction that describes a task. Write a response that appropriately completes the request.")
_LLAMA = "You are a helpful, respectful and honest assistant."
_ULTRALM = ("A one-turn chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
            "very detailed, and polite answers to the user's questions.")
_CHATML = _turns("<|im_start|>system\n{}<|im_end|>\n", "<|im_start|>user\n{}<|im_end|>\n",
                 "<|im_start|>assistant\n{}<|im_end|>\n", "<|im_start|>assistant\n")
# the system text is written in front of the first user's, inside its [INST]
_LLAMA2 = ("{% for message in messages %}{% if message.role == 'user' %}"
           "{{ '[INST] ' }}{% if loop.previtem is defined and loop.previtem.role == 'system' %}"
           "{{ '<<SYS>>\n' + loop.previtem.content + '\n<</SYS>>\n\n' }}{% endif %}{{ message.content + ' [/INST]' }}"
           "{% elif message.role == 'assistant' %}{{ ' ' + message.content + ' </s><s>' }}{% endif %}{% endfor %}")
FORMATS: dict[str, Format] = {
    "chat": Format(),
    "text": Format(text=True),
    "vicuna": Format(_turns("{} ", "USER: {} ", "ASSISTANT: {}</s>", "ASSISTANT:"), _VICUNA, ("</s>", "USER:")),
    "alpaca": Format(
        _turns("{}\n\n", "### Instruction:\n{}\n\n", "### Response:\n{}\n\n", "### Response:"),
        _ALPACA,
        ("</s>", "### Instruction:"),
    ),
    "llama-2": Format(_LLAMA2, _LLAMA, ("</s>", "[INST]")),
    "mpt": Format(_CHATML, "", ("<|im_end|>", "<|endoftext|>"), ("<|im_end|>", "<|endoftext|>")),
    "chatml": Format(_CHATML, "", ("<|im_end|>",), ("<|im_end|>", "</s>")),
    "falcon": Format(
        _turns("{}\n\n", "User: {}\n\n", "Assistant: {}\n\n", "Assistant:"), "", ("\nUser", "<|endoftext|>"), ("<|endoftext|>",)
    ),
    "starchat": Format(
        _turns(
            "<|system|>\n{}<|end|>\n",
            "<|user|>\n{}<|end|>\n",
            "<|assistant|>\n{}<|end|>\n",
            "<|assistant|>\n",
            "<|system|>\n<|end|>\n",
        ),
        "",
        ("<|end|>", "<|endoftext|>"),
        ("<|end|>", "<|endoftext|>"),
    ),
    "ultralm": Format(_turns("User: {}</s>\n", "User: {}</s>\n", "Assistant: {}</s>\n", "Assistant:"), _ULTRALM, ("</s>",)),
    "wizardlm-7b": Format(_turns("{}\n\n", "{}\n\n", "### Response:{}</s>", "### Response:"), "", ("</s>",)),
}
FORMATS |= {"wizardlm": FORMATS["vicuna"], "pythia": FORMATS["falcon"]}


def tidy(text: str, format: Format = FORMATS["chat"]) -> str:
    """An answer as it goes into a record: trimmed, without a closing token at its end, cut at four newlines in a row.

    Of a text that is continued (`Format.text`) the beginning stays as it is.
    """
    text = text.rstrip() if format.text else text.strip()
    closed = True
    while closed:
        closed = any(text.endswith(c) for c in format.closers)
        for closer in format.closers:
            text = text.removesuffix(closer).rstrip()
    return text.split("\n\n\n\n")[0].rstrip()
