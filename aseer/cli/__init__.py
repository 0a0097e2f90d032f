"""The command `aseer`: one module a subcommand, joined by `main`.

Nothing here is part of the library's interface; what a command does, a program can do
with `aseer.Engine`, `aseer.display` and `aseer.plot`.
"""
