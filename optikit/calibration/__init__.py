"""The block-by-block walk that every calibrated weight technique shares.

walk.py         the loop: block after block, commit after each, resume, assemble
method.py       what a technique is: a statistic of inputs, and what it does to a group of weights
skeleton.py     transformers' model without its weights; blocks filled and emptied one at a time
paused.py       a forward pass that waits at each group of linears until their new weights are in place
windows.py      calibration text → seeded windows of tokens
bounds.py       how much it may hold
arithmetic.py   which dtype to compute in on this processor
verify.py       re-open what was written and hold it to what was promised
"""
