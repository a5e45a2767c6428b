"""Print the plans of three width methods from phi-1.5 to phi-2. Only the configurations are read.

Run: python examples/compare_plans.py
"""

import phigrow
from phigrow.inspection.explain import axis_rows, claim

for method in ("wr", "tile", "lossless"):
    plan = phigrow.plan("phi-1_5", "phi2.json", method)
    print(f"{method}: {claim(plan)}")
    for axis, sizes, filling, write, read in axis_rows(plan):
        print(f"  {axis:14} {sizes:16} {filling:52} write {write:6} read {read}")
