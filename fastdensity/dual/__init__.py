"""From a network to its dual: capture, trace, rewrite; `fastdensity.jvp` is the door.

capture.py     what a callable is made of: modules, closed-over tensors, constants
watch.py       has anything changed since it was traced?
tracing.py     torch.export, and errors that name a line
functional.py  in-place operations made functional
precision.py   autocast made explicit
patterns.py    layers written out in pieces, put together again
rewrite.py     every node that depends on the input becomes its dual; rules*.py say how
fusion.py      which nodes become one kernel
fallback.py    nodes without a rule: torch.func.jvp of that one node
table.py       what became of each node, for `fd.explain`
"""
