"""The only package that starts, watches or ends a process, and that says how one died.

    with child.started(command, log=log) as program:   # its own session; ends with this process, and with the block
        program.watch("step", seconds=60)              # until it ends, or is too late
    if program.code:
        raise program.death("step")                    # a signal, no memory, a full disk, an exit code

`program` runs one to its end, `server` keeps one until a block ends, `variables` is what a child may see of this
process's environment, `failure` names what went wrong on either side of the border.
"""
