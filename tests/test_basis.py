import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedmerge.basis import Linear, Permutation, Resize, put_units_first, rebase, units_first
from fedmerge.spaces import Axis, Site, Space
from fedmerge.symmetry import symmetry

SITE = Site("here", 1, (0, 1, 2))


def test_a_permutation_and_its_inverse_undo_each_other() -> None:
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
    spaces = symmetry(model, torch.zeros(1, 3))
    index = torch.tensor([3, 1, 5, 0, 2, 4])
    there = rebase(model.state_dict(), spaces, [Permutation(index)])
    back = rebase(there, spaces, [Permutation(index.argsort())])
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())


def test_a_linear_change_leaves_a_linear_net_unchanged() -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 5), nn.Linear(5, 3)).double()
    images = torch.randn(7, 2, 4, 4, generator=generator, dtype=torch.float64)
    spaces = symmetry(model, images)
    changes = [
        Linear(torch.randn(space.size, space.size, generator=generator, dtype=torch.float64)) for space in spaces
    ]
    changed = rebase(model.state_dict(), spaces, changes)
    torch.testing.assert_close(functional_call(model, changed, (images,)), model(images), rtol=1e-10, atol=1e-10)


def test_a_linear_change_maps_features_by_its_matrix() -> None:
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    inputs = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    matrix = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    changed = rebase(model.state_dict(), symmetry(model, inputs), [Linear(matrix)])
    features = inputs @ changed["0.weight"].T + changed["0.bias"]
    torch.testing.assert_close(features, model[0](inputs) @ matrix)


def test_a_permutation_is_the_linear_change_by_its_matrix() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    spaces = symmetry(model, torch.zeros(1, 3))
    index = torch.tensor([2, 0, 3, 1])
    matrix = torch.eye(4, dtype=torch.float64)[index].T
    renamed = rebase(model.state_dict(), spaces, [Permutation(index)])
    mixed = rebase(model.state_dict(), spaces, [Linear(matrix)])
    for name, tensor in renamed.items():
        torch.testing.assert_close(mixed[name], tensor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_are_kept_and_the_input_is_untouched(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    spaces = symmetry(model, torch.zeros(1, 3))
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    before = {name: tensor.clone() for name, tensor in state.items()}
    for change in (Permutation(torch.tensor([1, 2, 3, 0])), Linear(torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0])))):
        assert {tensor.dtype for tensor in rebase(state, spaces, [change]).values()} == {dtype}
    assert all(torch.equal(state[name], before[name]) for name in state)


def test_a_dense_change_is_refused_where_weights_act_unit_by_unit() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    spaces = symmetry(model, torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match=r"unit by unit.*fold"):
        rebase(model.state_dict(), spaces, [Linear(torch.eye(4))])


def test_units_are_resized_by_one_matrix_for_writers_and_one_for_readers() -> None:
    writing = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    reading = torch.tensor([[0.5, 0.0, 0.5], [0.0, 1.0, 0.0]], dtype=torch.float64)
    change = Resize(writing, reading)
    weights = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])
    assert change.size == 2
    assert change.write(weights).tolist() == change.scale(weights).tolist() == [[[1, 2]], [[3, 4]], [[1, 2]]]
    assert change.read(weights).tolist() == [[[0.5, 1]], [[3, 4]], [[0.5, 1]]]
    assert change.read(weights).dtype == torch.float32


@pytest.mark.parametrize("shapes", [((2, 3), (3, 2)), ((2,), (2,))])
def test_resizing_needs_two_matrices_of_one_shape(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match=r"two matrices \(units, units of the result\), got \("):
        Resize(*(torch.zeros(shape) for shape in shapes))


@pytest.mark.parametrize("index", [[0, 0, 1], [0, 1, 3], [1, 2, 3]])
def test_what_is_no_permutation_is_refused(index: list[int]) -> None:
    with pytest.raises(ValueError, match="expected a permutation of 0 to 2"):
        Permutation(torch.tensor(index))


def test_numbers_and_sizes_of_changes_are_checked() -> None:
    space = Space(3, (Axis("a", 0),), (Axis("b", 1),), (), SITE)
    state = {"a": torch.zeros(3, 1), "b": torch.zeros(1, 3)}
    with pytest.raises(ValueError, match="one basis change for each of 1 spaces, got 0"):
        rebase(state, [space], [])
    with pytest.raises(ValueError, match="2 units came for a space of 3"):
        rebase(state, [space], [Permutation(torch.tensor([1, 0]))])


def test_a_block_of_a_tensor_is_indexed_and_the_rest_is_left() -> None:
    axis = Axis("w", 1, start=1, within=(0, 2, 4))
    tensor = torch.arange(20.0).reshape(5, 4)
    found = units_first(tensor, axis, 3)
    assert found.shape == (3, 1, 2)
    assert found[:, 0].T.tolist() == tensor[2:4, 1:].tolist()
    changed = tensor.clone()
    put_units_first(changed, axis, 3, found.flip(0))
    assert changed[2:4].tolist() == [[8.0, 11.0, 10.0, 9.0], [12.0, 15.0, 14.0, 13.0]]
    assert torch.equal(changed[[0, 1, 4]], tensor[[0, 1, 4]])


def test_a_block_is_of_another_dimension_than_the_units() -> None:
    with pytest.raises(ValueError, match="another dimension than 1 of 'w'"):
        Axis("w", 1, within=(1, 0, 2))


@pytest.mark.parametrize(
    ("axis", "expected"),
    [
        (Axis("w", 1), [[0], [1], [2]]),
        (Axis("w", 1, repeat=2), [[0, 1], [2, 3], [4, 5]]),
        (Axis("w", 1, start=2), [[2], [3], [4]]),
        (Axis("w", 1, repeat=2, index=(0, 3, 1, 4, 2, 5)), [[0, 3], [1, 4], [2, 5]]),
    ],
)
def test_the_entries_of_units_are_found_and_put_back(axis: Axis, expected: list[list[int]]) -> None:
    assert axis.entries(3).tolist() == expected
    tensor = torch.arange(12.0).reshape(2, 6)
    found: Tensor = units_first(tensor, axis, 3)
    assert found.shape == (3, axis.repeat, 2)
    assert found[1, 0].tolist() == tensor[:, expected[1][0]].tolist()
    changed = tensor.clone()
    put_units_first(changed, axis, 3, found)
    assert torch.equal(changed, tensor)
