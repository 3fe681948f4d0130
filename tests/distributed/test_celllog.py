import numpy as np

from scviaduct.distributed.celllog import CellLog, read_cells


def rows(log):
    return [(r.epoch, r.step, r.row) for r in log.itertuples()]


def test_two_ranks_in_one_attempt(tmp_path):
    for rank, cells in enumerate(([1, 2], [3])):
        CellLog(tmp_path, rank, 1).write(0, 0, np.array(cells))
    assert sorted(rows(read_cells(tmp_path))) == [(0, 0, 1), (0, 0, 2), (0, 0, 3)]


def test_steps_that_were_rolled_back_do_not_count(tmp_path):
    killed = CellLog(tmp_path, 0, 1)
    for step in range(5):  # the checkpoint was at step 3: steps 3 and 4 went with the process
        killed.write(0, step, np.array([10 * step]))
    again = CellLog(tmp_path, 0, 2)
    for step in range(3, 6):
        again.write(0, step, np.array([10 * step, 10 * step + 1]))
    log = read_cells(tmp_path)
    assert [r[1] for r in rows(log)] == [0, 1, 2, 3, 3, 4, 4, 5, 5]
    assert log[log.step == 3].attempt.tolist() == [2, 2]


def test_a_record_cut_by_the_kill_is_dropped(tmp_path):
    log = CellLog(tmp_path, 0, 1)
    log.write(0, 0, np.array([7]))
    with (tmp_path / "attempt-0001.rank-0000.i64").open("ab") as stream:
        stream.write(b"\0" * 13)
    assert rows(read_cells(tmp_path)) == [(0, 0, 7)]


def test_nothing_logged(tmp_path):
    assert len(read_cells(tmp_path)) == 0
