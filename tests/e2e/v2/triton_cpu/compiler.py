"""Compiles nothing: with TRITON_INTERPRET=1 no kernel comes as far as a compiler."""

from __future__ import annotations

from typing import Any

from triton.backends import compiler


class Compiler(compiler.BaseBackend):
    @staticmethod
    def supports_target(target: Any) -> bool:
        return target.backend == "cpu"

    def hash(self) -> str:
        return "interpreted"

    def parse_options(self, options: dict) -> object:
        return options

    def add_stages(self, stages: dict, options: object) -> None:
        raise NotImplementedError("set TRITON_INTERPRET=1: nothing is compiled here")

    def load_dialects(self, context: Any) -> None:
        pass

    def get_module_map(self) -> dict:
        return {}
