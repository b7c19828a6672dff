"""Stages done by other libraries: `backend: NAME` of a method is the module METHOD_NAME; each is a `stage.Stage`.

Each runs in the managed environment that its `ENVIRONMENT` names, so `run` imports what that environment has, and
optikit's own modules only as far as they live on torch, safetensors and tokenizers. What it writes is held to the same
promise as what our own stages write, and read back bit by bit.
"""
