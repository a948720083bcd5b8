"""ONNX functions that the ops' own bodies share, in ONNX's textual syntax.

Bodies compute in float32 and define an op's values; how a result is rounded is its reader's Cast. An argument that a
launcher lets out is its neutral element here: zeros for a bias or a residual, ones for a norm's weight or a cache's
scales, 0 for a window or a softcap, a stripe as long as the matrix.
"""

from __future__ import annotations

DOMAIN = "accel.kernels"
OPSET = 24
HEADER = f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}, "{DOMAIN}" : 1]>'

ACTIVATE = (
    HEADER
    + """
Activate <activation: int = -1> (x) => (y)
{
    kind = Constant <value_int: int = @activation> ()
    silu = Constant <value_int = 0> ()
    gelu_by_erf = Constant <value_int = 1> ()
    gelu_by_tanh = Constant <value_int = 2> ()
    sigmoid = Sigmoid (x)
    y0 = Mul (x, sigmoid)
    y1 = Gelu <approximate = "none"> (x)
    y2 = Gelu <approximate = "tanh"> (x)
    is0 = Equal (kind, silu)
    is1 = Equal (kind, gelu_by_erf)
    is2 = Equal (kind, gelu_by_tanh)
    or2 = Where (is2, y2, x)
    or1 = Where (is1, y1, or2)
    y = Where (is0, y0, or1)
}
"""
)

# sums [T, N], gated [T, 2N] in stripes; bias as wide, gated the gate's half first
GATE = (
    HEADER
    + """
Gate <gated: int = 0, stripe, activation: int = -1> (sums, bias) => (y)
{
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    axis = Constant <value_ints = [0]> ()
    same = Constant <value_ints = [0]> ()
    rest = Constant <value_ints = [-1]> ()
    gated = Constant <value_int: int = @gated> ()
    count = Add (gated, one)
    matrices = Unsqueeze (count, axis)
    length = Constant <value_int: int = @stripe> ()
    stripe = Unsqueeze (length, axis)
    by_stripe = Concat <axis = 0> (same, rest, matrices, stripe)
    striped = Reshape (sums, by_stripe)
    sorted = Transpose <perm = [0, 2, 1, 3]> (striped)
    by_matrix = Concat <axis = 0> (same, matrices, rest)
    apart = Reshape (sorted, by_matrix)
    bias_shape = Concat <axis = 0> (matrices, rest)
    biases = Reshape (bias, bias_shape)
    both = Add (apart, biases)
    gate = Gather <axis = 1> (both, zero)
    other = Gather <axis = 1> (both, gated)
    active = accel.kernels.Activate <activation: int = @activation> (gate)
    times = Mul (active, other)
    is_gated = Equal (gated, one)
    y = Where (is_gated, times, active)
}
"""
)

LINEAR = (
    HEADER
    + """
Linear <gated: int = 0, stripe, activation: int = -1> (x, weight, bias, residual) => (y)
{
    rows = Cast <to = 1> (x)
    matrix = Cast <to = 1> (weight)
    columns = Transpose <perm = [1, 0]> (matrix)
    sums = MatMul (rows, columns)
    shift = Cast <to = 1> (bias)
    value = accel.kernels.Gate <gated: int = @gated, stripe: int = @stripe, activation: int = @activation> (sums, shift)
    added = Cast <to = 1> (residual)
    y = Add (value, added)
}
"""
)

# weight int32 [N, K * bits / 32]: fields of a word by their places, less half of their range, times their group's scale
UNPACK = (
    HEADER
    + """
Unpack <bits> (weight, scales) => (matrix)
{
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    two = Constant <value_int = 2> ()
    four = Constant <value_int = 4> ()
    word_bits = Constant <value_int = 32> ()
    word_range = Constant <value_int = 4294967296> ()
    last = Constant <value_ints = [-1]> ()
    bits = Constant <value_int: int = @bits> ()
    count = Div (word_bits, bits)
    order = Range (zero, count, one)
    pair = Div (order, two)
    which = Mod (order, two)
    half = Mul (which, four)
    paired = Add (pair, half)
    is_int4 = Equal (bits, four)
    field = Where (is_int4, paired, order)
    place = Mul (field, bits)
    divisor = Pow (two, place)
    range = Pow (two, bits)
    signed = Cast <to = 7> (weight)
    wrapped = Add (signed, word_range)
    words = Mod (wrapped, word_range)
    column = Unsqueeze (words, last)
    shifted = Div (column, divisor)
    fields = Mod (shifted, range)
    middle = Div (range, two)
    whole = Sub (fields, middle)
    scale_shape = Shape (scales)
    grouped_shape = Concat <axis = 0> (scale_shape, last)
    grouped = Reshape (whole, grouped_shape)
    float_grouped = Cast <to = 1> (grouped)
    float_scales = Cast <to = 1> (scales)
    factor = Unsqueeze (float_scales, last)
    exact = Mul (float_grouped, factor)
    flat = Constant <value_ints = [0, -1]> ()
    matrix = Reshape (exact, flat)
}
"""
)

# norm: 0: none, 1: RMS norm, 2: layer norm
NORMALIZE = (
    HEADER
    + """
Normalize <norm: int = 0, eps: float = 0.0> (x, weight, bias) => (y)
{
    kind = Constant <value_int: int = @norm> ()
    none = Constant <value_int = 0> ()
    layer = Constant <value_int = 2> ()
    last = Constant <value_ints = [-1]> ()
    zero = Constant <value_float = 0.0> ()
    rows = Cast <to = 1> (x)
    mean = ReduceMean (rows, last)
    is_layer = Equal (kind, layer)
    center = Where (is_layer, mean, zero)
    centered = Sub (rows, center)
    squares = Mul (centered, centered)
    variance = ReduceMean (squares, last)
    little = Constant <value_float: float = @eps> ()
    raised = Add (variance, little)
    deviation = Sqrt (raised)
    scaled = Div (centered, deviation)
    factor = Cast <to = 1> (weight)
    weighted = Mul (scaled, factor)
    shift = Cast <to = 1> (bias)
    normalized = Add (weighted, shift)
    is_none = Equal (kind, none)
    y = Where (is_none, rows, normalized)
}
"""
)

# packed [T, (H + 2 KV) * D], cache [B, KV, C, D]
HEADS = (
    HEADER
    + """
Heads <heads> (packed, cache) => (queries, keys, values)
{
    axis = Constant <value_ints = [0]> ()
    keep_and_rest = Constant <value_ints = [0, -1]> ()
    kv_heads = Shape <start = 1, end = 2> (cache)
    dim = Shape <start = 3, end = 4> (cache)
    count = Constant <value_int: int = @heads> ()
    heads = Unsqueeze (count, axis)
    shape = Concat <axis = 0> (keep_and_rest, dim)
    apart = Reshape (packed, shape)
    sizes = Concat <axis = 0> (heads, kv_heads, kv_heads)
    queries, keys, values = Split <axis = 1> (apart, sizes)
}
"""
)

# x [T, H, D], cos and sin [T, D / 2]: the two halves of a head are the two axes of its rotations
ROTATE = (
    HEADER
    + """
Rotate (x, cos, sin) => (y)
{
    heads = Constant <value_ints = [1]> ()
    float_x = Cast <to = 1> (x)
    first, second = Split <axis = -1, num_outputs = 2> (float_x)
    float_cos = Cast <to = 1> (cos)
    float_sin = Cast <to = 1> (sin)
    c = Unsqueeze (float_cos, heads)
    s = Unsqueeze (float_sin, heads)
    first_c = Mul (first, c)
    second_s = Mul (second, s)
    second_c = Mul (second, c)
    first_s = Mul (first, s)
    new_first = Sub (first_c, second_s)
    new_second = Add (second_c, first_s)
    y = Concat <axis = -1> (new_first, new_second)
}
"""
)

# x [T, KV, D] and scales [KV, D] -> what a cache holds of keys and values, float32. rounding 0: a cache of floats,
# whose scales are ones; 1: int8; 2: float8_e4m3fn
STORED = (
    HEADER
    + """
Stored <rounding: int = 0> (x, scales) => (y)
{
    kind = Constant <value_int: int = @rounding> ()
    int8 = Constant <value_int = 1> ()
    float8 = Constant <value_int = 2> ()
    float_x = Cast <to = 1> (x)
    float_scales = Cast <to = 1> (scales)
    ratio = Div (float_x, float_scales)
    lowest = Constant <value_float = -128.0> ()
    highest = Constant <value_float = 127.0> ()
    nearest = Round (ratio)
    whole = Clip (nearest, lowest, highest)
    least = Constant <value_float = -448.0> ()
    most = Constant <value_float = 448.0> ()
    inside = Clip (ratio, least, most)
    short = Cast <to = 17> (inside)
    eight_bits = Cast <to = 1> (short)
    is_int8 = Equal (kind, int8)
    is_float8 = Equal (kind, float8)
    other = Where (is_float8, eight_bits, ratio)
    y = Where (is_int8, whole, other)
}
"""
)

# cache [B, KV, C, D] and scales [KV, D] -> the keys or values that it stands for, float32
MEANING = (
    HEADER
    + """
Meaning (cache, scales) => (y)
{
    axis = Constant <value_ints = [1]> ()
    numbers = Cast <to = 1> (cache)
    float_scales = Cast <to = 1> (scales)
    factor = Unsqueeze (float_scales, axis)
    y = Mul (numbers, factor)
}
"""
)

# query [B, KV, M, D], keys and values [B, KV, S, D], seen bool and bias as the scores [B, KV, M, S] or broadcast to
# them. A query that sees nothing gets zeros. softcap 0: none.
ATTEND = (
    HEADER
    + """
Attend <scale, softcap: float = 0.0> (query, keys, values, seen, bias) => (out)
{
    q = Cast <to = 1> (query)
    k = Cast <to = 1> (keys)
    v = Cast <to = 1> (values)
    k_transposed = Transpose <perm = [0, 1, 3, 2]> (k)
    products = MatMul (q, k_transposed)
    factor = Constant <value_float: float = @scale> ()
    scaled = Mul (products, factor)
    zero = Constant <value_float = 0.0> ()
    one = Constant <value_float = 1.0> ()
    cap = Constant <value_float: float = @softcap> ()
    has_cap = Greater (cap, zero)
    divisor = Where (has_cap, cap, one)
    small = Div (scaled, divisor)
    bounded = Tanh (small)
    capped = Mul (bounded, divisor)
    scores = Where (has_cap, capped, scaled)
    float_bias = Cast <to = 1> (bias)
    biased = Add (scores, float_bias)
    lowest = Constant <value_float = -1e30> ()
    masked = Where (seen, biased, lowest)
    shares = Softmax <axis = -1> (masked)
    visible = Where (seen, shares, zero)
    out = MatMul (visible, v)
}
"""
)

# bias [H, L, L], indices [T, 1] and slots [T, S] -> [T, H, S]; what lies outside is masked by the caller
BIAS = (
    HEADER
    + """
Bias (bias, index, slot) => (y)
{
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    axis0 = Constant <value_ints = [0]> ()
    axis1 = Constant <value_ints = [1]> ()
    length_axis = Shape <start = 2, end = 3> (bias)
    length = Squeeze (length_axis, axis0)
    most = Sub (length, one)
    line_column = Clip (index, zero, most)
    line = Squeeze (line_column, axis1)
    float_bias = Cast <to = 1> (bias)
    lines = Gather <axis = 1> (float_bias, line)
    place = Clip (slot, zero, most)
    heads = Shape <start = 0, end = 1> (bias)
    places = Shape (place)
    everywhere = Concat <axis = 0> (heads, places)
    spread = Expand (place, everywhere)
    cells = GatherElements <axis = 2> (lines, spread)
    y = Transpose <perm = [1, 0, 2]> (cells)
}
"""
)

# x [T, K], table [V, K], ids [P]; P divides T, and the ids are used over and over
ADD_ROWS = (
    HEADER
    + """
AddRows (x, table, ids) => (y)
{
    low = Gather <axis = 0> (table, ids)
    rows = Cast <to = 1> (low)
    shape = Shape (rows)
    last = Constant <value_ints = [-1]> ()
    by_turn = Concat <axis = 0> (last, shape)
    turns = Reshape (x, by_turn)
    sums = Add (turns, rows)
    width = Shape <start = 1> (rows)
    flat = Concat <axis = 0> (last, width)
    y = Reshape (sums, flat)
}
"""
)

SHARED = (ACTIVATE, ADD_ROWS, GATE, LINEAR, UNPACK, NORMALIZE, HEADS, ROTATE, STORED, MEANING, BIAS, ATTEND)

__all__ = ["DOMAIN", "HEADER", "OPSET", "SHARED"]
