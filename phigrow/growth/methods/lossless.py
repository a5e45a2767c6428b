"""lossless: any sizes, exactly, into the stock destination configuration, LayerNorm epsilon untouched.

With c = sqrt(D'/D) for hidden D -> D':

1. Writers of the residual stream: old rows c W, new rows c mean_rows(W). The stream's mean becomes c mu and its
   variance (D/D') c^2 var = var. Under RMSNorm new rows are 0: the mean square is (D/D') c^2 times what it was.
2. Normalisations: old weights gamma / c, old biases unchanged; new weights 1, new biases 0. The new coordinates equal
   the mean (are 0 under RMSNorm), so they normalise to exactly 0 at any weight. With tied embeddings, the head has the
   embedding's gain c, so the last normalisation gets gamma / c^2 and beta / c.
3. Readers: old columns unchanged, new columns random: they multiply 0, and make the new width trainable.
4. Head dimension h -> h': new coordinates at the end of each head; queries times k = sqrt(h'/h), because attention
   divides by the root; new key rows and biases 0; new query and value rows random; new columns of the output
   projection 0. A rotary part may grow by a whole factor m: its pair i, which turns by theta^(-i/n) a position,
   becomes pair m i of m n. Other factors change frequencies and are refused, as are scalings that depend on n.
   With LayerNorm inside heads (``qk_layernorm``), queries and keys grow as the stream does, head by head: old rows
   times k, new rows k times the head's mean. The norm of queries gets gamma and k beta, that of keys gamma / k and
   beta; at new coordinates weights are 1, and biases random in queries and 0 in keys.
5. New heads and new mlp units: rows random, the columns that read them 0.
6. Inserted layers are identity layers (depth method ``identity``).
7. New tokens: embeddings random (0 where tied), lm_head rows 0 and bias -100; refused without that bias.

Key/value heads and query heads a group may both grow, at any ratio: new heads are not read, wherever they lie.

Function-preserving in evaluation mode, to rounding. transformers computes rotary tables in float32; where the rotary
part grows, one of its frequencies may differ in the last bit (24, 74 or 124 turning coordinates at theta 10000, none
of the sizes in common use). The mean fill is LEMON's (2310.07999); LEMON changes epsilon and
does not grow heads.
"""

from __future__ import annotations

from phigrow.growth.axes import AxisMap
from phigrow.growth.exact_maps import kept_stream, refuse_inexact, statistics_kept, unread
from phigrow.growth.method import GrowthTask, Method, Options


def _axis_maps(task: GrowthTask, options: Options) -> dict[str, AxisMap]:
    refuse_inexact(task, "lossless")
    return {**unread(task), **kept_stream(task, statistics_kept(task))}


def _approximations(task: GrowthTask, options: Options) -> list[str]:
    return []


METHOD = Method(
    name="lossless",
    summary="the source's function at any size, plus new units whose outputs have zero weight at first",
    depth="identity",
    axis_maps=_axis_maps,
    approximations=_approximations,
    always_exact=True,
)
