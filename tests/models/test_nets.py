import copy
import dataclasses

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from scviaduct.errors import DataError
from scviaduct.models import row_kernels, rows
from scviaduct.models.counts import Cells
from scviaduct.models.nets import BatchNorm, CategoricalLinear, Columns, CountsLinear, Gaussian, Hidden, HiddenLayer

CPU = torch.device("cpu")


def test_look_ups_equal_one_hot_concatenation():
    layer = CategoricalLinear(4, 6, (3, 1, 2))
    x, codes = (
        torch.randn(5, 4),
        (torch.tensor([0, 1, 2, 2, 0]), torch.zeros(5, dtype=torch.long), torch.tensor([1, 0, 1, 1, 0])),
    )
    one_hot = [torch.nn.functional.one_hot(codes[k], n).float() for k, n in ((0, 3), (2, 2))]
    weight = torch.cat([layer.weight, layer.columns[0].weight.T, layer.columns[2].weight.T], 1)
    expected = torch.nn.functional.linear(torch.cat([x, *one_hot], 1), weight, layer.bias)
    torch.testing.assert_close(layer(x, codes), expected)
    assert layer.columns[1].weight is None  # one category: nothing to tell apart


def test_initialisation_counts_the_columns_as_inputs():
    layer = CategoricalLinear(10, 500, (90,))
    for tensor in layer.parameters():
        assert 0.095 < float(tensor.detach().abs().max()) <= 0.1


@pytest.mark.parametrize("cells", [1, 7, 70])
@pytest.mark.parametrize("width", [1, 13, 128])
def test_first_layer_equals_the_dense_product(make_schema, make_batch, dense, cells, width):
    schema = make_schema(genes=37, continuous=2)
    batch = make_batch(schema, cells)
    layer = CountsLinear(37, width, 2, (3,))
    seen = Cells.of(batch, schema, CPU)
    x = torch.cat([torch.log1p(torch.from_numpy(dense(batch))), torch.from_numpy(batch.continuous)], 1)
    upstream = torch.randn(cells, width)
    layer(seen, seen.codes).backward(upstream)
    with torch.no_grad():
        expected = x @ torch.cat([layer.weight, layer.continuous]) + layer.bias + layer.columns[0].weight[seen.codes[0]]
        torch.testing.assert_close(layer(seen, seen.codes), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.weight.grad, (x.T @ upstream)[:37], rtol=1e-4, atol=1e-4)


def test_a_device_without_kernels_uses_dense_counts(make_schema, make_batch, dense):
    schema = make_schema(genes=9)
    batch = make_batch(schema, 5)
    counts = Cells.of(batch, schema, CPU).counts
    np.testing.assert_array_equal(counts.dense.numpy(), dense(batch))
    weight = torch.randn(9, 4, dtype=torch.float64)
    torch.testing.assert_close(counts.product(counts.log1p_values, weight), torch.log1p(counts.dense).double() @ weight)
    np.testing.assert_array_equal(counts.total.numpy(), dense(batch).sum(1))


def test_read_only_and_compact_arrays_are_welcome(make_schema, make_batch):
    schema = make_schema()
    batch = make_batch(schema)
    compact = {
        "indptr": batch.indptr.astype(np.uint32),
        "indices": batch.indices.astype(np.uint16),
        "data": batch.data.astype(np.uint16),
    }
    for array in compact.values():
        array.flags.writeable = False
    other = type(batch)(n_genes=batch.n_genes, batch_index=batch.batch_index, **compact)
    a, b = (Cells.of(x, schema, CPU).counts for x in (batch, other))
    assert torch.equal(a.dense, b.dense)


def test_a_batch_of_another_schema_is_refused(make_schema, make_batch):
    batch = make_batch(make_schema(genes=40))
    with pytest.raises(DataError, match="has 40 genes, the model needs 39"):
        Cells.of(batch, make_schema(genes=39), CPU)
    with pytest.raises(DataError, match="0 continuous covariates, the model needs 24"):
        Cells.of(batch, make_schema(genes=40, continuous=1), CPU)


def test_damaged_counts_never_reach_the_kernels(make_schema, make_batch):
    schema = make_schema()
    batch = make_batch(schema)
    damages = {
        "gene indices -1": {"indices": np.where(batch.indices == 0, -1, batch.indices)},
        "… 40, but there are 40 genes": {"indices": np.where(batch.indices == 39, 40, batch.indices)},
        "does not rise": {"indptr": np.where(np.arange(25) == 3, batch.indptr[-1], batch.indptr)},
        "non-zeros": {"data": batch.data[:-1]},
        "7 labels": {"labels": np.zeros(7, np.int64)},
    }
    for message, damage in damages.items():
        with pytest.raises(DataError, match=message):
            Cells.of(dataclasses.replace(batch, **damage), schema, CPU)


def test_gaussian_kl_is_torch_s():
    q = Gaussian(torch.randn(5, 3), torch.rand(5, 3) + 0.1)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(
        normal(q.mean, q.std), normal(torch.tensor(0.5), torch.tensor(2.0))
    ).sum(1)
    torch.testing.assert_close(q.kl(0.5, 2.0), expected)


def test_unknown_codes_are_an_error():
    with pytest.raises(IndexError):
        Columns(0, 3, 4).add(torch.zeros(2, 4), (torch.tensor([0, 3]),))


def test_batch_norm_alone_is_torch_s():
    ours, theirs = BatchNorm(4), torch.nn.BatchNorm1d(4, momentum=0.01, eps=1e-3)
    for _ in range(3):
        x = torch.randn(10, 4) * 3 + 1
        torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x))


SHARES = [(6, 6), (3, 9), (11, 1), (12, 0)]


def _one_rank(rank: int, file: str, out: str, shares: tuple[int, int]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    x, upstream = _union(sum(shares))
    rows = slice(0, shares[0]) if rank == 0 else slice(shares[0], None)
    torch.save(_step(x[rows], upstream[rows]), f"{out}{rank}")
    dist.destroy_process_group()


def _union(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 4, generator=generator) * 2 + 30, torch.randn(n, 4, generator=generator)


def _step(x: torch.Tensor, upstream: torch.Tensor) -> dict[str, torch.Tensor]:
    norm = BatchNorm(4)
    with torch.no_grad():
        norm.weight.copy_(torch.arange(1.0, 5.0))
    x = x.clone().requires_grad_()
    y = norm(x)
    y.backward(upstream)
    return {"y": y.detach(), "x": x.grad, "weight": norm.weight.grad, "bias": norm.bias.grad,
            "mean": norm.running_mean, "var": norm.running_var} | _layer_step(x, upstream)  # fmt: skip


def _layer_step(x: torch.Tensor, upstream: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same of a hidden layer, whose steps are fused."""
    hidden = Hidden(n_hidden=4, n_layers=1, dropout_rate=0.0, batch_norm=True, layer_norm=False, n_categories=(2,), deep=True, labels=True)  # fmt: skip
    torch.manual_seed(0)
    layer, x = HiddenLayer(CategoricalLinear(4, 4, (2,)), hidden), (x.detach() - 30).requires_grad_()
    y = layer(x, [(x.detach()[:, 0] > 0).long()], None)
    y.backward(upstream)
    norm, columns = layer.batch_norm, layer.linear.columns[0]
    return {"layer y": y.detach(), "layer x": x.grad, "layer weight": norm.weight.grad, "layer bias": norm.bias.grad,
            "layer columns": columns.weight.grad, "layer linear": layer.linear.weight.grad,
            "layer mean": norm.running_mean, "layer var": norm.running_var}  # fmt: skip


@pytest.mark.parametrize("shares", SHARES, ids=str)
def test_two_processes_normalise_over_the_union_of_their_cells(tmp_path, shares):
    mp.spawn(_one_rank, (str(tmp_path / "store"), str(tmp_path / "out"), shares), nprocs=2)
    a, b = (torch.load(f"{tmp_path}/out{rank}", weights_only=True) for rank in range(2))
    alone = _step(*_union(sum(shares)))
    for name in ("y", "x", "layer y", "layer x"):
        torch.testing.assert_close(torch.cat([a[name], b[name]]), alone[name], rtol=1e-4, atol=1e-4)
    summed = ("weight", "bias", "layer weight", "layer bias", "layer columns", "layer linear")
    for name in summed:  # DDP sums these over the processes
        torch.testing.assert_close(a[name] + b[name], alone[name], rtol=1e-4, atol=1e-4)
    for name in ("mean", "var", "layer mean", "layer var"):
        torch.testing.assert_close(a[name], alone[name])
        assert torch.equal(a[name], b[name])


@pytest.mark.parametrize("categories", [(), (1,), (5,), (5, 1, 3)], ids=str)
@pytest.mark.parametrize("grows", [False, True], ids=["reference", "query"])
def test_rows_added_in_place_are_torch_s(categories, grows):
    """A large layer in float32, whose rows a kernel adds, and in float64 by torch's operations."""
    layer, cells = CategoricalLinear(7, 900, categories), 600
    codes, results = [torch.randint(0, n, (cells,)) for n in categories], []
    if grows and categories:
        layer.columns[0].extend(2)
    x, upstream = torch.randn(cells, 7), torch.randn(cells, 900)
    assert cells * 900 >= rows.LARGE
    for dtype in (torch.float32, torch.float64):
        net, given = copy.deepcopy(layer).to(dtype), x.to(dtype, copy=True).requires_grad_()
        y = net(given, codes)
        assert ("_Added" in y.grad_fn.name()) == (dtype == torch.float32)
        y.backward(upstream.to(dtype))
        results.append([y.detach(), given.grad, *(p.grad for p in net.parameters())])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-4)


def test_threads_do_not_change_the_sums_of_rows():
    h, codes, results = torch.randn(700, 900).numpy(), torch.randint(0, 4, (700,)).numpy(), []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        table = np.zeros((4, 900), np.float32)
        row_kernels.add_up(h, codes, table)
        results.append(table)
    torch.set_num_threads(before)
    assert np.array_equal(*results)


def test_codes_without_a_row_are_refused_before_a_kernel_reads_them():
    layer = CategoricalLinear(2, rows.LARGE, (3,))
    with pytest.raises(IndexError, match="codes up to 3, but 3 categories"):
        layer(torch.randn(1, 2), [torch.tensor([3])])
