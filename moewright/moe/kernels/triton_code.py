"""The Triton code of kernel 'triton': products and sums over rows that are sorted by expert.

Letters: T tokens, K experts a token, N = T * K assignments sorted by expert, D model width, E experts, F expert
width, H width of the first product (2F when gated, the gate half first; else F), G tiles.

A *tile* is a block of ROWS sorted assignments of one expert; `map_tiles` says where each one lies. Programs whose
tile does not exist end at once, so that the grid depends on shapes only and nothing is read back to the host. Rows
past a tile's end are read as copies of its last row, and never written. A *slot* is the place t * K + k of token t's
k-th choice.

Weights are read through pointers, or with DESCRIPTORS as tiles of a tensor descriptor over (E, ., .), which the copy
engine of Hopper and later fetches by itself. All products accumulate in float32.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

from moewright.moe.kernels.triton_activations import activate, up_factor

INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether the kernels run in Triton's interpreter, which asks for TRITON_INTERPRET when they are defined."""


@triton.jit
def map_tiles(ends_E, tiles_3G, E, G, ROWS: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    """Of each tile the expert (-1: there is no such tile), the first row, and the end of the expert's rows."""
    expert_E = tl.arange(0, EXPERTS)
    end_E = tl.load(ends_E + expert_E, mask=expert_E < E, other=0)
    start_E = tl.load(ends_E + expert_E - 1, mask=(expert_E > 0) & (expert_E < E), other=0)
    count_E = tl.where(expert_E < E, tl.cdiv(end_E - start_E, ROWS), 0)
    last_E = tl.cumsum(count_E, 0)
    tile_B = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert_B = tl.sum((last_E[None, :] <= tile_B[:, None]).to(tl.int32), 1)
    own_BE = expert_B[:, None] == expert_E[None, :]
    row_B = tl.sum(tl.where(own_BE, start_E + (tile_B[:, None] - last_E + count_E) * ROWS, 0), 1)
    end_B = tl.sum(tl.where(own_BE, end_E, 0), 1)
    tl.store(tiles_3G + tile_B, tl.where(tile_B < tl.max(last_E, 0), expert_B, -1), mask=tile_B < G)
    tl.store(tiles_3G + G + tile_B, row_B, mask=tile_B < G)
    tl.store(tiles_3G + 2 * G + tile_B, end_B, mask=tile_B < G)


@triton.jit
def _place(program, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row tile and column tile of a program: GROUP row tiles share the weights they read before the next columns."""
    first = program // (GROUP * tiles_n) * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    within = program % (GROUP * tiles_n)
    return first + within % size, within // size


@triton.jit
def _dot(a, b, sum_, PRECISION: tl.constexpr):
    if INTERPRETED:  # which would multiply the bits of a bfloat16 as an integer
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, sum_, input_precision=PRECISION)


@triton.jit
def _bound(scalar):
    if INTERPRETED:  # whose scalars are arrays of one element, which Python's range does not take
        return scalar.handle.data.item()
    else:  # noqa: RET505 - Triton compiles only the branch that a constant chooses
        return scalar


@triton.jit
def _weights(
    w, expert, depth, column, depths: tl.constexpr, columns: tl.constexpr, stride_e, stride_depth, stride_column,
    DEPTH_LAST: tl.constexpr, DESCRIPTORS: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """(DEPTH, COLUMNS) of an expert's weights from (depth, column) on; zeros outside of (depths, columns).

    Through a descriptor, whose bounds are those of the whole tensor, columns from `columns` on hold anything.
    """
    if DESCRIPTORS:
        if DEPTH_LAST:
            tile = w.load([expert, column, depth]).reshape(COLUMNS, DEPTH).T
        else:
            tile = w.load([expert, depth, column]).reshape(DEPTH, COLUMNS)
    else:
        depth_K = depth + tl.arange(0, DEPTH)
        column_C = column + tl.arange(0, COLUMNS)
        at_KC = w + expert.to(tl.int64) * stride_e + depth_K[:, None] * stride_depth + column_C[None, :] * stride_column
        inside_KC = (column_C < columns)[None, :]
        if depths % DEPTH != 0:
            inside_KC = inside_KC & (depth_K < depths)[:, None]
        tile = tl.load(at_KC, mask=inside_KC, other=0.0)
    return tile


@triton.jit
def _row_tile(at_R, depth, depths: tl.constexpr, DEPTH: tl.constexpr):
    """(ROWS, DEPTH) from the rows that start at the pointers `at_R`."""
    depth_K = depth + tl.arange(0, DEPTH)
    if depths % DEPTH == 0:
        tile = tl.load(at_R[:, None] + depth_K[None, :])
    else:
        tile = tl.load(at_R[:, None] + depth_K[None, :], mask=(depth_K < depths)[None, :], other=0.0)
    return tile


@triton.jit
def first_product(
    x_TD, w_EHD, bias_EH, token_N, tiles_3G, h_NH, a_NF, G, stride_e, stride_h, stride_d,
    D: tl.constexpr, F: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, KEEP: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """`h = x[token] @ w.T + bias` and `a = act(gate half of h) * up half`; h is written only if KEEP."""
    tile, columns = _place(tl.program_id(0), G, tl.cdiv(F, COLUMNS), GROUP)
    expert = tl.load(tiles_3G + tile)
    if expert < 0:
        return
    row_R = tl.load(tiles_3G + G + tile) + tl.arange(0, ROWS)
    end = tl.load(tiles_3G + 2 * G + tile)
    at_R = x_TD + tl.load(token_N + tl.minimum(row_R, end - 1)) * D
    column = columns * COLUMNS
    gate_RC = tl.zeros((ROWS, COLUMNS), tl.float32)
    up_RC = gate_RC
    for depth in range(0, D, DEPTH):
        x_RK = _row_tile(at_R, depth, D, DEPTH)
        w_KC = _weights(
            w_EHD, expert, depth, column, D, F, stride_e, stride_d, stride_h, True, DESCRIPTORS, DEPTH, COLUMNS
        )
        gate_RC = _dot(x_RK, w_KC, gate_RC, PRECISION)
        if GATED:
            w_KC = _weights(
                w_EHD, expert, depth, column + F, D, 2 * F, stride_e, stride_d, stride_h,
                True, DESCRIPTORS, DEPTH, COLUMNS,
            )  # fmt: skip
            up_RC = _dot(x_RK, w_KC, up_RC, PRECISION)
    # Half of the columns after the other: all at once would not fit into the registers.
    gate_left_RC, gate_right_RC = _halves(gate_RC, ROWS, COLUMNS)
    up_left_RC, up_right_RC = _halves(up_RC, ROWS, COLUMNS)
    _write_hidden(
        gate_left_RC, up_left_RC, bias_EH, h_NH, a_NF, expert, row_R, end, column,
        F, ACTIVATION, GATED, BIAS, KEEP, COLUMNS // 2,
    )  # fmt: skip
    _write_hidden(
        gate_right_RC, up_right_RC, bias_EH, h_NH, a_NF, expert, row_R, end, column + COLUMNS // 2,
        F, ACTIVATION, GATED, BIAS, KEEP, COLUMNS // 2,
    )  # fmt: skip


@triton.jit
def _halves(x_RC, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of the columns."""
    return x_RC.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()


@triton.jit
def _write_hidden(
    gate_RC, up_RC, bias_EH, h_NH, a_NF, expert, row_R, end, column,
    F: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, KEEP: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write what `first_product` writes, for these columns."""
    column_C = column + tl.arange(0, COLUMNS)
    inside_RC = (row_R < end)[:, None] & (column_C < F)[None, :]
    H: tl.constexpr = 2 * F if GATED else F
    h_RC = h_NH + row_R.to(tl.int64)[:, None] * H + column_C[None, :]
    if BIAS:
        bias_C = bias_EH + expert * H + column_C
        gate_RC += tl.load(bias_C, mask=column_C < F, other=0.0).to(tl.float32)[None, :]
    if KEEP:
        tl.store(h_RC, gate_RC.to(h_NH.dtype.element_ty), mask=inside_RC)
    a_RC, _ = activate(gate_RC, ACTIVATION)
    if GATED:
        if BIAS:
            up_RC += tl.load(bias_C + F, mask=column_C < F, other=0.0).to(tl.float32)[None, :]
        if KEEP:
            tl.store(h_RC + F, up_RC.to(h_NH.dtype.element_ty), mask=inside_RC)
        factor_RC, _ = up_factor(up_RC, ACTIVATION)
        a_RC *= factor_RC
    at_RC = a_NF + row_R.to(tl.int64)[:, None] * F + column_C[None, :]
    tl.store(at_RC, a_RC.to(a_NF.dtype.element_ty), mask=inside_RC)


@triton.jit
def slot_product(
    rows_NI, w_EOI, bias_EO, weights_N, order_N, tiles_3G, slots_NO, G, stride_e, stride_o, stride_i,
    INNER: tl.constexpr, OUTER: tl.constexpr,
    WEIGHTED: tl.constexpr, BIAS: tl.constexpr, DEPTH_LAST: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """`slots[order[n]] = (rows[n] @ w.T + bias) * weights[order[n]]`: one row for each slot, written once."""
    tile, columns = _place(tl.program_id(0), G, tl.cdiv(OUTER, COLUMNS), GROUP)
    expert = tl.load(tiles_3G + tile)
    if expert < 0:
        return
    row_R = tl.load(tiles_3G + G + tile) + tl.arange(0, ROWS)
    end = tl.load(tiles_3G + 2 * G + tile)
    at_R = rows_NI + tl.minimum(row_R, end - 1).to(tl.int64) * INNER
    column = columns * COLUMNS
    y_RC = tl.zeros((ROWS, COLUMNS), tl.float32)
    for depth in range(0, INNER, DEPTH):
        r_RK = _row_tile(at_R, depth, INNER, DEPTH)
        w_KC = _weights(
            w_EOI, expert, depth, column, INNER, OUTER, stride_e, stride_i, stride_o,
            DEPTH_LAST, DESCRIPTORS, DEPTH, COLUMNS,
        )  # fmt: skip
        y_RC = _dot(r_RK, w_KC, y_RC, PRECISION)
    column_C = column + tl.arange(0, COLUMNS)
    slot_R = tl.load(order_N + tl.minimum(row_R, end - 1))
    if BIAS:
        bias_C = tl.load(bias_EO + expert * OUTER + column_C, mask=column_C < OUTER, other=0.0)
        y_RC += bias_C.to(tl.float32)[None, :]
    if WEIGHTED:
        y_RC *= tl.load(weights_N + slot_R)[:, None]
    at_RC = slots_NO + slot_R[:, None] * OUTER + column_C[None, :]
    tl.store(at_RC, y_RC.to(slots_NO.dtype.element_ty), mask=(row_R < end)[:, None] & (column_C < OUTER)[None, :])


@triton.jit
def sum_choices(
    slots_ND, position_N, ends_E, y_TD, T, D, E,
    K: tl.constexpr, PARTIAL: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`y[t] = sum of slots t * K to t * K + K - 1`, in this order and in float32; slots of no expert are left out."""
    token_t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column_C = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside_tC = (token_t < T)[:, None] & (column_C < D)[None, :]
    y_tC = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for k in tl.static_range(K):
        slot_t = token_t.to(tl.int64) * K + k
        filled_tC = inside_tC
        if PARTIAL:
            position_t = tl.load(position_N + slot_t, mask=token_t < T, other=0)
            filled_tC = inside_tC & (position_t < tl.load(ends_E + E - 1))[:, None]
        at_tC = slots_ND + slot_t[:, None] * D + column_C[None, :]
        y_tC += tl.load(at_tC, mask=filled_tC, other=0.0).to(tl.float32)
    at_tC = y_TD + token_t.to(tl.int64)[:, None] * D + column_C[None, :]
    tl.store(at_tC, y_tC.to(y_TD.dtype.element_ty), mask=inside_tC)


@triton.jit
def hidden_gradient(
    dy_TD, w_EDF, bias_ED, h_NH, weights_N, token_N, order_N, tiles_3G, dh_NH, aw_NF, dots_NB, G,
    stride_e, stride_d, stride_f, D: tl.constexpr, F: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """From `g = dy[token] @ w`: the gradient of h, the weighted activations, and this block's share of `<g, a>`.

    `<g, a> + <dy, bias>` is the gradient of a combine weight, since `<w.T dy, a> = <dy, w a>`: so the outputs of the
    experts need not be kept.
    """
    tile, columns = _place(tl.program_id(0), G, tl.cdiv(F, COLUMNS), GROUP)
    expert = tl.load(tiles_3G + tile)
    if expert < 0:
        return
    row_R = tl.load(tiles_3G + G + tile) + tl.arange(0, ROWS)
    end = tl.load(tiles_3G + 2 * G + tile)
    at_R = dy_TD + tl.load(token_N + tl.minimum(row_R, end - 1)) * D
    column = columns * COLUMNS
    g_RC = tl.zeros((ROWS, COLUMNS), tl.float32)
    dot_R = tl.zeros((ROWS,), tl.float32)
    for depth in range(0, D, DEPTH):
        dy_RK = _row_tile(at_R, depth, D, DEPTH)
        w_KC = _weights(
            w_EDF, expert, depth, column, D, F, stride_e, stride_d, stride_f, False, DESCRIPTORS, DEPTH, COLUMNS
        )
        g_RC = _dot(dy_RK, w_KC, g_RC, PRECISION)
        if BIAS:
            depth_K = depth + tl.arange(0, DEPTH)
            bias_K = tl.load(bias_ED + expert * D + depth_K, mask=depth_K < D, other=0.0).to(tl.float32)
            dot_R += tl.sum(dy_RK.to(tl.float32) * bias_K[None, :], 1)
    slot_R = tl.load(order_N + tl.minimum(row_R, end - 1))
    weight_R = tl.load(weights_N + slot_R)
    dot_R = tl.where(columns == 0, dot_R, 0.0)
    left_RC, right_RC = _halves(g_RC, ROWS, COLUMNS)
    dot_R += _hidden_gradient(
        left_RC, h_NH, weight_R, dh_NH, aw_NF, row_R, end, column, F, ACTIVATION, GATED, COLUMNS // 2
    )
    dot_R += _hidden_gradient(
        right_RC, h_NH, weight_R, dh_NH, aw_NF, row_R, end, column + COLUMNS // 2, F, ACTIVATION, GATED, COLUMNS // 2
    )
    tl.store(dots_NB + slot_R * tl.cdiv(F, COLUMNS) + columns, dot_R, mask=row_R < end)


@triton.jit
def _hidden_gradient(
    g_RC, h_NH, weight_R, dh_NH, aw_NF, row_R, end, column,
    F: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write what `hidden_gradient` writes for these columns, except `<g, a>`, which is returned."""
    column_C = column + tl.arange(0, COLUMNS)
    inside_RC = (row_R < end)[:, None] & (column_C < F)[None, :]
    H: tl.constexpr = 2 * F if GATED else F
    hidden_RC = row_R.to(tl.int64)[:, None] * H + column_C[None, :]
    a_RC, slope_RC = activate(tl.load(h_NH + hidden_RC, mask=inside_RC, other=0.0).to(tl.float32), ACTIVATION)
    dh_RC = g_RC * weight_R[:, None]
    if GATED:
        up_RC = tl.load(h_NH + hidden_RC + F, mask=inside_RC, other=0.0).to(tl.float32)
        factor_RC, up_slope_RC = up_factor(up_RC, ACTIVATION)
        dup_RC = dh_RC * a_RC * up_slope_RC
        tl.store(dh_NH + hidden_RC + F, dup_RC.to(dh_NH.dtype.element_ty), mask=inside_RC)
        a_RC *= factor_RC
        slope_RC *= factor_RC
    tl.store(dh_NH + hidden_RC, (dh_RC * slope_RC).to(dh_NH.dtype.element_ty), mask=inside_RC)
    at_RC = aw_NF + row_R.to(tl.int64)[:, None] * F + column_C[None, :]
    tl.store(at_RC, (a_RC * weight_R[:, None]).to(aw_NF.dtype.element_ty), mask=inside_RC)
    return tl.sum(tl.where(inside_RC, g_RC * a_RC, 0.0), 1)


@triton.jit
def outer_product(
    a_P, b_Q, token_N, order_N, weights_N, ends_E, w_EPQ, bias_EP, stride_e, stride_p, stride_q,
    P: tl.constexpr, Q: tl.constexpr,
    GATHER_A: tl.constexpr, GATHER_B: tl.constexpr, BIAS: tl.constexpr, WEIGHTED: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """`w[e] = a[rows of e].T @ b[rows of e]` and `bias[e] = the (WEIGHTED) sum of a's rows`, zero without a row.

    The rows of a, of b or of neither are gathered by token.
    """
    tiles_p = tl.cdiv(P, ROWS)
    tiles_q = tl.cdiv(Q, COLUMNS)
    expert = tl.program_id(0) // (tiles_p * tiles_q)
    p, q = _place(tl.program_id(0) % (tiles_p * tiles_q), tiles_p, tiles_q, GROUP)
    start = tl.load(ends_E + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_E + expert)
    p_C = p * ROWS + tl.arange(0, ROWS)
    q_C = q * COLUMNS + tl.arange(0, COLUMNS)
    sum_PQ = tl.zeros((ROWS, COLUMNS), tl.float32)
    bias_P = tl.zeros((ROWS,), tl.float32)
    first_K = start + tl.arange(0, DEPTH)
    token_K = tl.load(token_N + first_K, mask=first_K < end, other=0)
    for row in range(_bound(start), _bound(end), DEPTH):
        row_K = row + tl.arange(0, DEPTH)
        inside_K = row_K < end
        from_a_K = row_K.to(tl.int64)
        from_b_K = row_K.to(tl.int64)
        if GATHER_A:
            from_a_K = token_K
        if GATHER_B:
            from_b_K = token_K
        # One step ahead, so that the pipeline need not wait for the tokens before it can ask for their rows.
        token_K = tl.load(token_N + row_K + DEPTH, mask=row_K + DEPTH < end, other=0)
        at_KP = a_P + from_a_K[:, None] * P + p_C[None, :]
        at_KQ = b_Q + from_b_K[:, None] * Q + q_C[None, :]
        a_KP = tl.load(at_KP, mask=inside_K[:, None] & (p_C < P)[None, :], other=0.0)
        b_KQ = tl.load(at_KQ, mask=inside_K[:, None] & (q_C < Q)[None, :], other=0.0)
        sum_PQ = _dot(tl.trans(a_KP), b_KQ, sum_PQ, PRECISION)
        if BIAS:
            a_KP = a_KP.to(tl.float32)
            if WEIGHTED:
                slot_K = tl.load(order_N + row_K, mask=inside_K, other=0)
                a_KP *= tl.load(weights_N + slot_K, mask=inside_K, other=0.0)[:, None]
            bias_P += tl.sum(a_KP, 0)
    at_PQ = w_EPQ + expert.to(tl.int64) * stride_e + p_C[:, None] * stride_p + q_C[None, :] * stride_q
    tl.store(at_PQ, sum_PQ.to(w_EPQ.dtype.element_ty), mask=(p_C < P)[:, None] & (q_C < Q)[None, :])
    if BIAS:
        tl.store(bias_EP + expert * P + p_C, bias_P.to(bias_EP.dtype.element_ty), mask=(p_C < P) & (q == 0))
