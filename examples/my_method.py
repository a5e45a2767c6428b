"""averaged-heads: new heads are copies that share the work of the old ones, and new layers start as identity layers.

c copies of a head are each read with 1/c, so their sum is the old head. Everything else grows as in `lossless`: new
units are random and read with zeros, and the statistics of the residual stream stay. Function-preserving.

    phigrow expand --src phi-1_5 --dst-config phi2.json --method my_method.py
"""

from phigrow.methods import (
    Method,
    Option,
    axis_map,
    copies_of_each,
    drawn_evenly,
    kept_stream,
    refuse_inexact,
    statistics_kept,
    unread,
    wrap,
)


def axis_maps(task, options):
    """Return one map for each axis of the family."""
    refuse_inexact(task, "averaged-heads")
    maps = {**unread(task), **kept_stream(task, statistics_kept(task))}
    for axis in task.family.heads:  # the number of key/value heads, and of query heads for each
        src, dst = task.sizes(axis)
        source = wrap(src, dst) if options["order"] == "wrap" else drawn_evenly(task.seed, axis, src, dst)
        maps[axis] = axis_map(src, source, read=1 / copies_of_each(src, source))
    return maps


def approximations(task, options):
    """Return the reasons why the function changes: there are none."""
    return []


METHOD = Method(
    name="averaged-heads",
    summary="copies of heads, each read over their number; new units and layers have no effect at first",
    depth="identity",
    axis_maps=axis_maps,
    approximations=approximations,
    options={"order": Option(str, "wrap", "which heads are copied", choices=("wrap", "random"))},
    always_exact=True,
)

if __name__ == "__main__":
    import phigrow

    plan = phigrow.plan("phi-1_5", "phi2.json", METHOD)
    print(f"{plan.method}: {'exact' if plan.exact else plan.approximations}")
