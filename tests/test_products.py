from __future__ import annotations

import json
import stat

import pytest
import torch
import torch.nn.functional as F

from groupsae import products
from groupsae.products import fast_linears, linear, onednn_is_faster

CPU = torch.device("cpu")


@pytest.fixture
def onednn(monkeypatch):
    """As on a machine whose faster product is oneDNN's; counts the products it makes."""
    if not products._has_onednn():
        pytest.skip("this PyTorch is built without oneDNN")
    made = []
    product = products._onednn
    monkeypatch.setattr(products, "onednn_is_faster", lambda threads: True)
    monkeypatch.setattr(products, "_onednn", lambda *a: made.append(a[0].shape) or product(*a))
    return made


@pytest.fixture
def unmeasured(monkeypatch, tmp_path):
    """As on a machine where nothing has been measured yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    onednn_is_faster.cache_clear()
    yield tmp_path / "groupsae"
    onednn_is_faster.cache_clear()


def matrices(rows=(5, 3), width=33, outputs=17, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*rows, width, generator=generator, dtype=dtype)
    weight = torch.randn(outputs, width, generator=generator, dtype=dtype)
    return x, weight, torch.randn(outputs, generator=generator, dtype=dtype)


@pytest.mark.parametrize("rows", [(), (0,), (1,), (5,), (5, 3), (2, 3, 4)])
def test_the_product_is_that_in_float64(onednn, rows):
    x, weight, bias = matrices(rows)
    for given in (bias, None):
        exact = F.linear(x.double(), weight.double(), None if given is None else given.double())
        product = linear(x, weight, given)
        assert product.shape == exact.shape
        torch.testing.assert_close(product.double(), exact, rtol=1e-5, atol=1e-5)
    assert len(onednn) == 2


def test_views_that_are_not_contiguous(onednn):
    x, weight, bias = matrices()
    x, weight = x.transpose(0, 1), weight.T.contiguous().T
    exact = F.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(linear(x, weight, bias).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("outputs", "width"), [(0, 4), (3, 0)])
def test_no_outputs_and_no_inputs(onednn, outputs, width):
    bias = torch.randn(outputs)
    found = linear(torch.randn(5, width), torch.randn(outputs, width), bias)
    assert torch.equal(found, bias.expand(5, outputs) if width == 0 else torch.empty(5, 0))


def test_gradients_and_other_dtypes_are_left_to_pytorch(onednn):
    x, weight, bias = matrices()
    weight.requires_grad_()
    linear(x, weight, bias).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum((0, 1)).expand_as(weight))
    linear(*matrices(dtype=torch.float64))
    assert onednn == []


def test_modules_within_use_it(onednn):
    x, weight, bias = matrices((6,))
    module = torch.nn.Linear(33, 17).requires_grad_(False)
    expected = F.linear(x, module.weight, module.bias), torch.addmm(bias, x, weight.T)
    with fast_linears(CPU):
        got = module(x), torch.addmm(bias, x, weight.T), torch.addmm(x @ weight.T, x, weight.T)
    assert len(onednn) == 2
    torch.testing.assert_close(got[:2], expected)
    with fast_linears(torch.device("meta")):
        module(x)
    module(x)
    assert len(onednn) == 2


def test_what_is_faster_is_measured_once_and_kept(unmeasured, monkeypatch):
    if not products._has_onednn():
        pytest.skip("this PyTorch is built without oneDNN")
    first = onednn_is_faster(1)
    (file,) = unmeasured.glob("products-*.json")
    measured = json.loads(file.read_text())
    assert measured["torch"] > 0
    assert measured["onednn"] > 0
    assert first == (measured["agree"] and measured["onednn"] > 1.03 * measured["torch"])
    monkeypatch.setattr(products, "_measure", lambda: pytest.fail("measured again"))
    onednn_is_faster.cache_clear()
    assert onednn_is_faster(1) == first


@pytest.mark.parametrize(
    ("measured", "faster"),
    [
        ({"torch": 100.0, "onednn": 200.0, "agree": True}, True),
        ({"torch": 100.0, "onednn": 101.0, "agree": True}, False),
        ({"torch": 100.0, "onednn": 200.0, "agree": False}, False),
    ],
)
def test_onednn_must_be_clearly_faster_and_as_exact(unmeasured, monkeypatch, measured, faster):
    monkeypatch.setattr(products, "_has_onednn", lambda: True)
    monkeypatch.setattr(products, "_measure", lambda: measured)
    assert onednn_is_faster(1) is faster


def test_where_nothing_can_be_kept_it_is_pytorchs(unmeasured, monkeypatch):
    monkeypatch.setattr(products, "_has_onednn", lambda: True)
    unmeasured.mkdir()
    unmeasured.chmod(0o777)
    assert not onednn_is_faster(1)
    assert list(unmeasured.iterdir()) == []
    unmeasured.chmod(stat.S_IRWXU)
    monkeypatch.setattr(products, "_measure", lambda: {"torch": 1.0, "onednn": 9.0, "agree": True})
    onednn_is_faster.cache_clear()
    assert onednn_is_faster(1)
    next(unmeasured.iterdir()).write_text("{")
    onednn_is_faster.cache_clear()
    assert not onednn_is_faster(1)


def test_a_product_that_is_less_exact_is_seen(monkeypatch):
    x, weight, bias = matrices((64,), 512, 32)
    assert products._as_exact(x, weight, bias) or not products._has_onednn()
    rounded = torch.bfloat16
    monkeypatch.setattr(
        products, "_onednn", lambda *a: F.linear(*(part.to(rounded) for part in a)).float()
    )
    assert not products._as_exact(x, weight, bias)
