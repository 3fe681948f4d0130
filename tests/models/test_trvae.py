"""TRVAE: equal to the numbers of scArches' trVAE, and what surgery and several processes keep."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from scviaduct.distributed.config import FitConfig
from scviaduct.distributed.gradients import backward
from scviaduct.distributed.workers import Workers
from scviaduct.errors import ConfigError, DataError
from scviaduct.models.base import Quantity
from scviaduct.models.counts import Cells
from scviaduct.models.mmd import mmd
from scviaduct.models.surgery import adapter, attach, extend, report
from scviaduct.models.trvae import TRVAE, TRVAEConfig
from scviaduct.models.upstream_scarches import load_trvae
from scviaduct.schema import Batch, Covariate, Schema
from tests.models.test_parity import Given

GOLDEN = Path(__file__).parents[1] / "golden" / "trvae"
CASES = sorted(p.stem for p in GOLDEN.glob("*.npz") if not p.stem.startswith("surgery"))
SURGERIES = ["surgery_nb", "surgery_nb_old_condition_in_query", "surgery_zinb_unfreeze_expression"]
KL_WEIGHT = 0.3
CPU = torch.device("cpu")


def as_batch(x: np.ndarray, codes: np.ndarray) -> Batch:
    n = len(x)
    return Batch(
        n_genes=x.shape[1],
        indptr=np.concatenate([[0], np.cumsum((x > 0).sum(1))]).astype(np.int64),
        indices=np.nonzero(x)[1].astype(np.int32),
        data=x[x > 0],
        batch_index=codes,
        categorical=np.zeros((n, 0), np.int64),
        continuous=np.zeros((n, 0), np.float32),
        rows=np.arange(n),
        seeds=np.arange(n, dtype=np.uint64),
    )


def as_config(record: dict) -> TRVAEConfig:
    """The original's options under our names."""
    same = {k: record[k] for k in ("recon_loss", "use_mmd", "mmd_on", "hidden_layer_sizes")}
    norm = "both" if record["use_ln"] and not record["use_bn"] else "none"
    return TRVAEConfig(
        **same,
        n_latent=record["latent_dim"],
        dropout_rate=record["dr_rate"],
        target_sum=0.0,
        mmd_boundary=record.get("mmd_boundary"),
        beta=record.get("beta", 1.0),
        use_batch_norm="both" if record["use_bn"] else "none",
        use_layer_norm=norm,
    )


def schema_of(n_genes: int, conditions: list[str]) -> Schema:
    return Schema(genes=tuple(f"g{i}" for i in range(n_genes)), batch=Covariate("condition", tuple(conditions)))


def group(arrays, prefix: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): torch.from_numpy(v) for k, v in arrays.items() if k.startswith(prefix)}


def load(case: str) -> tuple[dict, dict[str, np.ndarray]]:
    with np.load(GOLDEN / f"{case}.npz", allow_pickle=False) as file:
        return json.loads((GOLDEN / f"{case}.json").read_text())["config"], dict(file)


@pytest.fixture(params=CASES)
def case(request):
    record, arrays = load(request.param)
    x = arrays["input/x"]
    model = TRVAE(schema_of(x.shape[1], record["conditions"]), as_config(record))
    load_trvae(model, group(arrays, "state/"))
    eps, batch = torch.from_numpy(arrays["input/eps"]), as_batch(x, arrays["input/cond"])
    return SimpleNamespace(name=request.param, arrays=arrays, model=model, batch=batch, eps=eps)


@pytest.fixture(scope="module", autouse=True)
def all_cases_are_there():
    assert len(CASES) == 14


def close(ours, theirs, rtol=1e-5, atol=2e-6):
    theirs = torch.as_tensor(theirs, dtype=ours.dtype).detach()
    torch.testing.assert_close(ours.detach(), theirs, rtol=rtol, atol=atol)


def modes(case):
    yield "out_eval/", False
    if any(name.startswith("out_train/") for name in case.arrays):
        yield "out_train/", True


@pytest.mark.parity("outputs")
def test_latents_rates_and_parts_of_the_loss(case):
    for prefix, training in modes(case):
        out, model = group(case.arrays, prefix), case.model.train(training)
        cells = Cells.of(case.batch, model.schema, CPU)
        with torch.no_grad():
            load_trvae(model, group(case.arrays, "state/"))  # running statistics moved
            qz = model.inference(cells, None)
            z = qz.sample(Given(case.eps))
            y, heads = model.generative(z, cells, None)
        close(qz.mean, out["z_mean"])
        close(qz.std**2, out["z_var"])
        close(z, out["z_sample"])
        close(y, out["y_first_decoder_layer"])
        close(qz.kl(), out["kl_per_cell"])
        if model.px_r is None:
            close(torch.relu(heads["mean"]), out["recon_x"])
        else:
            px = model._px(heads, cells)
            close(px.scale, out["px_scale"])
            close(px.rate, out["px_rate"])
            close(px.theta, out["theta"])
        if model.compares_conditions:
            on = z if model.config.mmd_on == "z" else y
            close(model.config.beta * mmd(on, cells.codes[0], model.config.mmd_boundary), out["mmd_loss"])


@pytest.mark.parity("outputs")
def test_encode_and_expression_are_at_the_mean(case):
    out = group(case.arrays, "out_eval/")
    close(case.model.encode(case.batch).mean, out["z_mean"])
    if case.model.px_r is None:
        with pytest.raises(ConfigError, match="no distribution of counts"):
            case.model.expression(case.batch)
        return
    px = case.model.expression(case.batch)
    close(px.scale, out["at_mean_px_scale"])
    close(px.theta, out["at_mean_theta"])
    latent = Quantity(name="expression", library_size=None)
    close(case.model.decoded(case.batch, latent), out["at_mean_px_rate"])


@pytest.mark.parity("loss")
def test_loss_and_its_parts(case):
    model, arrays = case.model.train(), case.arrays
    losses = model(case.batch, KL_WEIGHT, Given(case.eps))
    n = case.batch.n_cells
    close(losses.loss, arrays["loss/total"])
    close(losses.reconstruction / n, arrays["loss/recon"])
    close(losses.kl / n, arrays["loss/kl"])
    close(losses.extra.get("mmd", torch.zeros(())) / n, arrays["loss/mmd"])


@pytest.mark.parity("gradients")
def test_gradients(case):
    model, arrays = case.model.train(), case.arrays
    model(case.batch, KL_WEIGHT, Given(case.eps)).loss.backward()
    theirs = as_model(model, group(arrays, "state/") | group(arrays, "grad/"))
    for name, parameter in model.named_parameters():
        # In one case two latents nearly meet: float32 is 1e-5 from float64 there, theirs as ours.
        close(parameter.grad, theirs[name], rtol=1e-4, atol=2e-5 if case.name == "nb" else 4e-6)


def as_model(model: TRVAE, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of the original in our layout, brought there by the importer itself."""
    twin = TRVAE(model.schema, model.config)
    load_trvae(twin, state)
    return twin.state_dict()


@pytest.mark.parity("20 steps")
@pytest.mark.parametrize("decay", [0.0, 0.04])
def test_five_steps_of_adam(case, decay):
    model = case.model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=0.01, weight_decay=decay)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        out = model(case.batch, KL_WEIGHT, Given(case.eps))
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.detach())
    close(torch.stack(losses), case.arrays[f"loss/trajectory_wd{decay}"])
    for name, tensor in as_model(model, group(case.arrays, f"adam5_wd{decay}/")).items():
        close(model.state_dict()[name], tensor, rtol=1e-5, atol=2e-6)


def test_import_says_what_does_not_fit(case):
    state = group(case.arrays, "state/")
    with pytest.raises(DataError, match=r"no tensor 'encoder\.mean_encoder"):
        load_trvae(case.model, {k: v for k, v in state.items() if "mean_encoder" not in k})
    with pytest.raises(DataError, match=r"cond_L\.weight'.*\(7, 8\).*\(3, 8\)"):
        load_trvae(case.model, state | {"encoder.FC.L0.cond_L.weight": torch.zeros(8, 7)})
    with pytest.raises(DataError, match=r"1 tensors .* no place in the model, e\.g\. 'encoder\.FC\.L7"):
        load_trvae(case.model, state | {"encoder.FC.L7.weight": torch.zeros(1)})


@pytest.fixture(params=SURGERIES)
def surgery(request):
    """The reference, and the query that starts from the original's new columns."""
    record, arrays = load(request.param)
    old, new = record["reference_conditions"], record["query_conditions"]
    reference = TRVAE(schema_of(arrays["input/x"].shape[1], old), as_config(record))
    load_trvae(reference, group(arrays, "ref/"))
    spared = () if record["freeze_expression"] else tuple(f"{part}.layers.0.linear" for part in ("encoder", "decoder"))
    schema = dataclasses.replace(reference.schema, batch=Covariate("condition", tuple(new)))
    query = extend(reference, schema, trained=spared)
    start = as_model(TRVAE(query.schema, query.config), group(arrays, "query0/"))
    with torch.no_grad():
        for name, parameter in query.named_parameters():
            parameter.copy_(rows(start, name, len(old)))
    eps, batch = torch.from_numpy(arrays["input/eps"]), as_batch(arrays["input/x"], arrays["input/cond"])
    return SimpleNamespace(
        arrays=arrays, reference=reference, query=query.train(), batch=batch, eps=eps, n_old=len(old), spared=spared
    )


def rows(theirs: dict[str, torch.Tensor], name: str, n_old: int) -> torch.Tensor:
    """What the original has of a query's parameter: all of it, or the rows of the new conditions."""
    return theirs[name.replace(".new", ".weight")][n_old:] if name.endswith(".new") else theirs[name]


@pytest.mark.parity("surgery")
def test_only_rows_of_new_conditions_train(surgery):
    """And, with `freeze_expression=False`, the two first layers."""
    names = {name for name, _ in surgery.query.named_parameters()}
    layers = [f"{part}.layers.0.linear" for part in ("encoder", "decoder")]
    also = {f"{layers[0]}.weight", f"{layers[0]}.bias", f"{layers[1]}.weight"} if surgery.spared else set()
    assert names == {f"{place}.new" for place in ("px_r", *(f"{layer}.columns.0" for layer in layers))} | also
    assert surgery.query.couples_cells
    close(surgery.query.encode(surgery.batch).mean, surgery.arrays["latent/query_before"])


@pytest.mark.parity("surgery")
@pytest.mark.parametrize("decay", [0.0, 0.04])
def test_a_query_trains_as_the_original_s_new_columns(surgery, decay):
    """The original's reference columns move by weight decay, and by training if the query has the condition; ours do not."""
    query, arrays, n_old = surgery.query, surgery.arrays, surgery.n_old
    optimizer = torch.optim.Adam(query.parameters(), lr=1e-3, eps=0.01, weight_decay=decay)
    losses = []
    for step in range(3):
        optimizer.zero_grad()
        losses.append(query(surgery.batch, 1.0, Given(surgery.eps)).loss)
        losses[-1].backward()
        if step == 0:
            theirs = as_model(TRVAE(query.schema, query.config), group(arrays, "query0/") | group(arrays, "grad1/"))
            for name, parameter in query.named_parameters():
                close(parameter.grad, rows(theirs, name, n_old), rtol=1e-4, atol=4e-6)
        optimizer.step()
    theirs = as_model(TRVAE(query.schema, query.config), group(arrays, f"after3_wd{decay}/"))
    places = [name.removesuffix(".new") + ".weight" for name, _ in query.named_parameters() if name.endswith(".new")]
    moved = any(not torch.equal(theirs[place][:n_old], query.get_buffer(place)) for place in places)
    for name, parameter in query.named_parameters():
        # Where upstream's reference columns moved too, the new ones saw another model: by less than a tenth of a step.
        close(parameter, rows(theirs, name, n_old), atol=1e-4 if moved else 2e-6)
    if not moved:
        close(torch.stack(losses), arrays[f"loss/trajectory_wd{decay}"])
        close(query.encode(surgery.batch).mean, arrays["latent/query_after_wd0"], atol=4e-6)
    changed = {name for name, change in report(surgery.reference, query).items() if change}
    assert changed == {name for name, _ in query.named_parameters() if not name.endswith(".new")}
    if changed:
        return
    reference = as_batch(arrays["input/ref_x"], arrays["input/ref_cond"])
    assert torch.equal(query.encode(reference).mean, surgery.reference.encode(reference).mean)
    close(query.encode(reference).mean, arrays["latent/ref_before"])


def test_batch_norms_of_a_query_keep_the_reference_s_statistics():
    record, arrays = load("surgery_nb_bn")
    reference = TRVAE(schema_of(arrays["input/x"].shape[1], record["reference_conditions"]), as_config(record))
    load_trvae(reference, group(arrays, "ref/"))
    query = extend(
        reference,
        dataclasses.replace(reference.schema, batch=Covariate("condition", tuple(record["query_conditions"]))),
    ).train()
    batch = as_batch(arrays["input/x"], arrays["input/cond"])
    optimizer = torch.optim.SGD(query.query_parameters(), lr=0.1)
    query(batch).loss.backward()
    optimizer.step()
    assert set(report(reference, query).values()) == {0.0}
    known = as_batch(arrays["input/ref_x"], arrays["input/ref_cond"])
    close(query.encode(known).mean, arrays["latent/ref_before"])


@pytest.mark.parity("surgery")
def test_an_adaptor_of_the_original_is_one_condition_of_an_adapter():
    """scArches saves the columns of one condition (`Adaptor`) and attaches them to a reference; so do we."""
    (record, arrays), (saved, adaptor) = load("surgery_nb"), load("surgery_adaptor")
    reference = TRVAE(schema_of(arrays["input/x"].shape[1], record["reference_conditions"]), as_config(record))
    load_trvae(reference, group(arrays, "ref/"))

    def extended(*conditions):
        batch = reference.schema.batch.extended(conditions)
        return extend(reference, dataclasses.replace(reference.schema, batch=batch))

    one, both = extended(saved["adaptor_condition"]), extended(*record["query_conditions"][3:])
    places = {"px_r": "theta", "encoder": "encoder.FC.L0.cond_L.weight", "decoder": "decoder.FirstL.L0.cond_L.weight"}
    columns = {name: torch.from_numpy(adaptor["adaptor/" + places[name.split(".")[0]]].T) for name in adapter(one)}
    attach(one, columns)
    theirs = as_model(TRVAE(one.schema, one.config), group(adaptor, "attached/"))
    for name, tensor in one.state_dict().items():
        place = name.removesuffix(".new") + ".weight" if name.endswith(".new") else name
        close(tensor, theirs[place][3:] if name.endswith(".new") else theirs[place][: len(tensor)])
    start = as_model(TRVAE(both.schema, both.config), group(arrays, "query0/"))
    attach(both, {name: rows(start, name, 3) for name in adapter(both)})
    z = record["query_conditions"].index(saved["adaptor_condition"]) - 3
    for name, tensor in adapter(both).items():
        close(tensor[[z]], columns[name])


def test_an_adapter_makes_the_same_query(surgery):
    again = extend(surgery.reference, surgery.query.schema, trained=surgery.spared)
    attach(again, adapter(surgery.query))
    assert torch.equal(again.encode(surgery.batch).mean, surgery.query.encode(surgery.batch).mean)


def small(**options) -> TRVAEConfig:
    return TRVAEConfig(**({"hidden_layer_sizes": (16, 8), "n_latent": 4, "dropout_rate": 0.2} | options))


OPTIONS = {
    "z": {},
    "y, zinb": {"mmd_on": "y", "recon_loss": "zinb"},
    "boundary": {"mmd_boundary": 1, "beta": 3.0},
    "batch norm": {"use_batch_norm": "both", "use_layer_norm": "none"},
    "mse": {"recon_loss": "mse"},
}
STEPS = [(name, options, (37, 11)) for name, options in OPTIONS.items()] + [("z", {}, (24, 24)), ("z", {}, (47, 1))]
Job = tuple[Schema, TRVAEConfig, Batch, list[Batch]]


def _one_rank(rank: int, file: str, out: str, jobs: list[Job]) -> None:
    """All steps in one pair of processes: starting one costs more than its steps."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    steps = [_step(schema, config, parts[rank], Workers(rank, 2), b.n_cells) for schema, config, b, parts in jobs]
    torch.save(steps, f"{out}{rank}")
    dist.destroy_process_group()


def _step(
    schema: Schema, config: TRVAEConfig, batch: Batch, workers: Workers, n_global: int
) -> dict[str, torch.Tensor]:
    """Gradients and sums of one step, as the training loop computes them."""
    torch.manual_seed(3)
    model = TRVAE(schema, config)
    sums = backward(workers.wrap(model), batch, 0.5, n_global, workers, FitConfig())
    return {"sums": sums, **{name: p.grad for name, p in model.named_parameters()}}


def test_two_processes_give_the_gradient_of_the_whole_batch(tmp_path, make_schema, make_batch, rows_of):
    schema, jobs = make_schema(), []
    batch = make_batch(schema, 48)
    # the last condition is on one process only, so one process sees no pair with it
    batch = dataclasses.replace(batch, batch_index=np.where(np.arange(48) < 10, 2, batch.batch_index % 2))
    for _, options, (first, _) in STEPS:
        jobs.append(
            (schema, small(**options), batch, [rows_of(batch, slice(first)), rows_of(batch, slice(first, None))])
        )
    mp.spawn(_one_rank, (str(tmp_path / "store"), str(tmp_path / "out"), jobs), nprocs=2)
    ranks = [torch.load(f"{tmp_path}/out{rank}", weights_only=True) for rank in range(2)]
    for case, job, one, two in zip(STEPS, jobs, *ranks, strict=True):
        alone = _step(*job[:3], Workers(), batch.n_cells)
        close(one.pop("sums") + two.pop("sums"), alone.pop("sums"), rtol=1e-5)
        for name, gradient in alone.items():
            assert torch.equal(one[name], two[name])
            size = float(gradient.abs().max())
            assert float((one[name] - gradient).abs().max()) < 1e-4 * size + 1e-6, f"{case}: {name}"


def test_evaluation_leaves_the_mmd_out(make_schema, make_batch):
    model = TRVAE(make_schema(), small(dropout_rate=0.0))
    batch = make_batch(model.schema)
    with_it, without = model.train()(batch), model.eval()(batch)
    assert not without.extra
    close(with_it.loss - with_it.extra["mmd"] / batch.n_cells, without.loss)
    assert float(with_it.extra["mmd"]) > 0


def test_what_couples_cells(make_schema):
    def couples(batches=3, **options):
        return TRVAE(make_schema(batches=batches), small(**options)).couples_cells

    assert couples() and couples(use_mmd=False, use_batch_norm="encoder")
    assert not any([couples(use_mmd=False), couples(beta=0.0), couples(batches=1)])


def test_mse_reads_log_normalised_values_or_what_is_stored(make_schema, make_batch, dense):
    schema = make_schema(genes=12)
    batch = make_batch(schema, 6)
    x = dense(batch)
    normalised = np.log1p(x / x.sum(1, keepdims=True) * 100)
    model = TRVAE(schema, small(recon_loss="mse", target_sum=100.0)).eval()
    by_hand = TRVAE(schema, small(recon_loss="mse", target_sum=0.0)).eval()
    by_hand.load_state_dict(model.state_dict())
    given = as_batch(normalised.astype(np.float32), batch.batch_index)
    close(model.encode(batch).mean, by_hand.encode(given).mean)
    noise = torch.randn(6, 4)
    ours = model(batch, noise=Given(noise))
    close(ours.loss, by_hand(given, noise=Given(noise)).loss)
    values = model.decoded(batch, Quantity(name="expression"), Given(noise))
    close(ours.reconstruction, ((values - torch.from_numpy(normalised)) ** 2).sum())


@pytest.mark.parametrize("target_sum", [0.0, 1e4])
def test_squared_errors_of_extreme_cells(make_schema, target_sum):
    """A cell without counts, one that stores zeros, and counts of a million: finite, as float64 computes them."""
    x = np.array([[0, 0, 0, 0], [1e6, 0, 1, 0], [1e6, 1e6, 1e6, 1e6], [0, 0, 3, 0]], np.float32)
    indptr, indices = np.array([0, 2, 4, 8, 9]), np.array([0, 1, 0, 2, 0, 1, 2, 3, 2], np.int32)
    data = np.array([0, 0, 1e6, 1, *[1e6] * 4, 3], np.float32)
    batch = dataclasses.replace(as_batch(x, np.zeros(4, np.int64)), indptr=indptr, indices=indices, data=data)
    model = TRVAE(make_schema(genes=4), small(recon_loss="mse", target_sum=target_sum, use_mmd=False, dropout_rate=0.0))
    totals = np.maximum(x.sum(1, keepdims=True, dtype=np.float64), 1)
    expected = torch.from_numpy(np.log1p(x * (target_sum / totals)) if target_sum else x.astype(np.float64))
    noise = torch.randn(4, 4)
    losses = model(batch, noise=Given(noise))
    losses.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    decoded = model.decoded(batch, Quantity(name="expression"), Given(noise)).double()
    close(losses.reconstruction.double(), ((decoded - expected) ** 2).sum(), rtol=1e-5)


def test_a_size_factor_replaces_the_total(make_schema, make_batch):
    model = TRVAE(make_schema(size_factor=True), small())
    batch = make_batch(model.schema)
    rates = model.decoded(batch, Quantity(name="expression", library_size=None))
    close(rates.sum(1), batch.size_factor, rtol=1e-4)


@pytest.mark.parametrize(
    "wrong",
    [{"hidden_layer_sizes": ()}, {"hidden_layer_sizes": (8, 0)}, {"recon_loss": "nbb"}, {"mmd_on": "x"}, {"beta": -1.0},
     {"mmd_boundary": 0}, {"use_batch_norm": "all"}, {"target_sum": -1.0}],
    ids=str,
)  # fmt: skip
def test_wrong_options_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        TRVAEConfig(**wrong)
