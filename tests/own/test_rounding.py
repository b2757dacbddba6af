"""tests/own/rounding.py: what it rounds, and what it says of it."""

import importlib.util
import re
import sys

import pytest
import rounding
import torch

import p3o


def test_tf32_keeps_ten_bits_and_bf16_seven_to_the_nearest():
    torch.manual_seed(0)
    x = torch.randn(10_000) * 10.0 ** torch.randint(-5, 6, (10_000,))
    for function, bits in ((rounding.to_tf32, 10), (rounding.to_bf16, 7)):
        found = function(x)
        off = ((found - x) / x).abs().max()
        assert 0.9 * 2.0 ** -(bits + 1) < off <= 2.0 ** -(bits + 1)
        assert torch.equal(function(found), found)
    values = torch.tensor([1 + 2.0**-10, 1 + 0.4 * 2.0**-10, 1 + 0.6 * 2.0**-10, -3.0, 0.0])
    expected = torch.tensor([1 + 2.0**-10, 1.0, 1 + 2.0**-10, -3.0, 0.0])
    assert torch.equal(rounding.to_tf32(values), expected)


@pytest.mark.parametrize("into", ["TF32", rounding.BODY_ONLY, "bf16"])
def test_each_linear_layer_is_rounded_and_the_embedding_is_not(tiny, into):
    model = tiny[0]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    copy = rounding.rounded(model, into)
    function = rounding.to_tf32 if into == "TF32" else rounding.to_bf16
    x = torch.randn(3, model.config.n_embd)
    with torch.no_grad():
        layer = model.transformer.h[0].mlp.c_fc
        found = copy.transformer.h[0].mlp.c_fc(x)
        exact = function(x) @ function(layer.weight) + layer.bias
        assert torch.allclose(found, exact if into == "TF32" else function(exact), rtol=1e-2)
        assert torch.equal(found, function(found)) == (into != "TF32")
        head = copy.lm_head(x)
        if into == rounding.BODY_ONLY:
            assert torch.equal(head, model.lm_head(x))
        else:
            product = function(x) @ function(model.lm_head.weight).T
            assert torch.allclose(head, product, rtol=1e-2, atol=1e-3)
            assert torch.equal(head, function(head)) == (into == "bf16")
            assert not torch.allclose(head, model.lm_head(x), atol=1e-6)
    assert torch.equal(copy.transformer.wte.weight, model.transformer.wte.weight)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), "the model itself is left alone"


def test_a_step_moves_each_weight_up_or_down_and_a_shared_one_once(tiny):
    model = tiny[0]
    with torch.no_grad():
        moved = rounding.step(model, 0.5)
    assert moved.lm_head.weight is moved.transformer.wte.weight
    up = []
    for new, old in zip(moved.parameters(), model.parameters(), strict=True):
        assert torch.allclose((new - old).abs(), torch.tensor(0.5))
        up.append((new > old).flatten())
    assert 0.45 < torch.cat(up).float().mean() < 0.55


def test_bf16_moves_log_ratios_more_than_tf32_and_that_more_than_the_step(capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    rows = printed("1e-7", capsys)
    assert asked == ["highest"], "where there is a GPU, p3o.py has set TF32"
    assert list(rows) == list(rounding.PRECISIONS)
    exact, tf32, body, bf16 = rows.values()
    assert exact[0] == 0
    assert 4 * tf32[0] < body[0] < bf16[0]
    assert exact[1] < tf32[1] < bf16[1] / 4
    assert exact[2] <= tf32[2] <= bf16[2] > 0.5
    far = printed("1e-3", capsys)["fp32"][1]
    assert far > 100 * max(exact[1], 1e-4), "a larger step goes further"


def test_what_moves_both_responses_alike_does_not_move_u(capsys, monkeypatch):
    def same_for_both(model, ids, mask):
        return model.get_input_embeddings().weight.sum().expand(ids.shape[:-1])

    monkeypatch.setattr(p3o, "sequence_logprobs", same_for_both)
    for _, size, beyond in printed("1e-3", capsys).values():
        assert size == beyond == 0


def printed(lr: str, capsys) -> dict[str, list[float]]:
    """The figures of each precision."""
    rounding.main(["--small", "--lr", lr, "--minibatch", "16", "--clip-range", "1e-3"])
    shown = capsys.readouterr().out
    assert re.search(r"16 pairs, responses of 1\d tokens", shown)
    pattern = r"(.+): log.* off by (\S+) nats; u after a step (\S+), beyond ε in (\S+) of"
    return {name: list(map(float, row)) for name, *row in re.findall(pattern, shown)}


def test_too_few_pairs_and_bad_input_are_one_line():
    with pytest.raises(SystemExit, match=r"^rounding.py: .*fewer than a --minibatch"):
        rounding.main(["--small", "--minibatch", "20000"])
    with pytest.raises(SystemExit, match=r"^rounding.py: .*nowhere"):
        rounding.main(["--small", "--data", "nowhere"])


def test_on_a_gpu_products_are_tf32_and_on_a_cpu_all_is_fp32(monkeypatch):
    """As the script loads, with and without one."""
    asked = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    for there, precisions in ((False, []), (True, ["high"])):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        spec = importlib.util.spec_from_file_location("p3o_again", p3o.__file__)
        again = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "p3o_again", again)  # dataclasses look there
        spec.loader.exec_module(again)
        assert asked == precisions
