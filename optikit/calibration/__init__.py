"""The block-by-block walk that every calibrated weight technique shares.

blockwise.py         the loop: block after block, commit after each, resume, write
method.py            what a technique is: a statistic of inputs, a change of a group's weights, a layout
methods/             techniques that share a statistic and a layout, for any kernel; and those with their own
write_checkpoint.py  layouts: how results are written and verified
empty_model.py       transformers' model without its weights; blocks filled and emptied one at a time
paused_forward.py    a forward pass that waits at each group of linears until their new weights are in place
forward_passes.py    such passes of all batches, within a bound of memory
gram.py              mean of x xᵀ, and what outputs lack to be the dense model's
resume.py            what survives a killed walk
calibration_set.py   calibration text → seeded windows of tokens
budget.py            how much it may hold
distributed.py       one walk in several processes
verify.py            re-open what was written and hold it to what was promised
"""
