"""diffusers' own tests of its pipelines, with their pipelines as they are and accelerated (`graph="step"`).

    python scripts/diffusers_pipeline_tests.py CHECKOUT TESTS... [-- pytest arguments]

CHECKOUT is a folder with diffusers' `tests/`, best of the version that is installed; nothing of it is changed or copied. TESTS
are files and folders in `tests/pipelines`. What passes without `accelerate` has to pass with it. The file is the plugin of both
pytests too: nothing is downloaded, small tokenizers and text encoders with random weights take the place of those on the hub.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

STAND_INS = "hf-internal-testing/tiny-random-"
replays = 0


def accelerate_pipelines() -> None:
    """Have each pipeline accelerated when it is called first."""
    from diffusers import DiffusionPipeline

    from fastddim import accelerate, acceleration

    register, replay = DiffusionPipeline.register_modules, acceleration._StaticStep.__call__

    def counted(self: Any) -> Any:
        global replays
        replays += 1
        return replay(self)

    def replace_call(kind: Any) -> None:
        own = kind.__call__
        if hasattr(own, "accelerates"):
            return

        @functools.wraps(own)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if type(self) is not kind:
                return own(self, *args, **kwargs)
            accelerate(self, graph="step")
            return type(self).__call__(self, *args, **kwargs)

        call.accelerates = True
        kind.__call__ = call

    @functools.wraps(register)
    def register_modules(self: Any, **kwargs: Any) -> None:
        # An accelerated one's class has it from its own.
        if "_unaccelerated" not in vars(type(self)):
            replace_call(type(self))
        register(self, **kwargs)

    DiffusionPipeline.register_modules = register_modules
    acceleration._StaticStep.__call__ = counted


def stand_in() -> None:
    """Make tokenizers and models of the hub's names for tests, where a test loads one."""
    import tokenizers
    import transformers

    letters = [chr(k) + end for end in ("", "</w>") for k in range(ord("a"), ord("z") + 1)]

    def clip_tokenizer(**kwargs: Any) -> Any:
        words = [*letters, "<|startoftext|>", "<|endoftext|>"]
        return transformers.CLIPTokenizer(
            vocab={word: k for k, word in enumerate(words)}, merges=[], model_max_length=77, **kwargs
        )

    def word_tokenizer(**kwargs: Any) -> Any:
        model = tokenizers.models.WordLevel(
            {word: k for k, word in enumerate(["<pad>", "</s>", "<unk>", *letters])}, unk_token="<unk>"
        )
        words = tokenizers.Tokenizer(model)
        words.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
        special = {
            "pad_token": "<pad>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "cls_token": "<pad>",
            "sep_token": "</s>",
        }
        return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special, **kwargs)

    def t5_config(**kwargs: Any) -> Any:
        return transformers.T5Config(vocab_size=1103, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, **kwargs)

    def bert(**kwargs: Any) -> Any:
        size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
        return transformers.BertModel(transformers.BertConfig(vocab_size=1124, **size), **kwargs)

    def replace(kind: Any, make: Any) -> None:
        load = kind.from_pretrained.__func__

        def from_pretrained(cls: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
            if str(name).startswith(STAND_INS):
                return make(**{key: value for key, value in kwargs.items() if key == "model_max_length"})
            return load(cls, name, *args, **kwargs)

        kind.from_pretrained = classmethod(from_pretrained)

    replace(transformers.CLIPTokenizer, clip_tokenizer)
    for name in ("AutoTokenizer", "T5Tokenizer", "T5TokenizerFast", "RobertaTokenizer"):
        replace(getattr(transformers, name), word_tokenizer)
    replace(transformers.AutoConfig, t5_config)
    replace(transformers.T5EncoderModel, lambda: transformers.T5EncoderModel(t5_config()))
    replace(transformers.BertModel, bert)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say how many steps were captured ones: none where pipelines are as they are."""
    terminalreporter.write_line(f"{replays} captured steps")


def run(tests: Path, names: list[str], rest: list[str], accelerated: bool) -> dict[str, str]:
    """The outcome of each test: passed, failed or skipped."""
    here = Path(__file__).resolve()
    paths = [str(here.parent), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1",
        "FASTDDIM_ACCELERATED": str(int(accelerated)),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = [
            "-p",
            here.stem,
            "-p",
            "no:cacheprovider",
            "--rootdir",
            str(tests.parent),
            "-q",
            f"--junitxml={report}",
        ]
        command = [
            sys.executable,
            "-m",
            "pytest",
            *options,
            *(str(tests / "pipelines" / name) for name in names),
            *rest,
        ]
        subprocess.run(command, env=environment, cwd=tests.parent)
        outcomes = {}
        for case in ElementTree.parse(report).iter("testcase"):
            kinds = {child.tag for child in case}
            outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
            outcomes[f"{case.get('classname')}::{case.get('name')}"] = outcome
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="a folder with diffusers' tests/")
    parser.add_argument("tests", nargs="+", help="files and folders in tests/pipelines")
    arguments = [*sys.argv[1:], "--"]
    at = arguments.index("--")
    options, rest = parser.parse_args(arguments[:at]), arguments[at + 1 : -1]
    tests = options.checkout.resolve() / "tests"
    for name in options.tests:
        if not (tests / "pipelines" / name).exists():
            parser.error(f"tests: {tests / 'pipelines' / name} is missing; pass the root of a checkout of diffusers")
    own, ours = (run(tests, options.tests, rest, accelerated) for accelerated in (False, True))
    for title, outcomes in (("as they are", own), ("accelerated", ours)):
        counts = {kind: list(outcomes.values()).count(kind) for kind in ("passed", "failed", "skipped")}
        print(f"{title}: " + ", ".join(f"{count} {kind}" for kind, count in counts.items()))
    worse = [name for name, outcome in own.items() if outcome == "passed" and ours.get(name) != "passed"]
    print(
        "\n".join(
            ["passed as they are alone:", *worse]
            if worse
            else ["every test that passes as they are passes accelerated"]
        )
    )
    return bool(worse)


if __name__ == "__main__":
    sys.exit(main())
else:
    stand_in()
    if os.environ.get("FASTDDIM_ACCELERATED") == "1":
        accelerate_pipelines()
