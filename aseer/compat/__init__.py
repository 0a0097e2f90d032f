"""Whether aseer fits a vLLM or an LMCache, read from their source; nothing is imported.

    python -m aseer.compat                      what is installed
    python -m aseer.compat 0.33.0               a release, whose wheel pip fetches
    python -m aseer.compat DIR...               unpacked wheels, a folder each

Two tables say what aseer relies on: `names.py` every name it uses of them, with the
parameters it gives, and `facts.py` what it takes for granted of how they behave. A name
that is gone, or a fact that changed, is told with the feature that it breaks.
"""
