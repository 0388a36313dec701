"""What the tests of prune_ share: two weights of `build_net`, and whether they are held at 0."""

from __future__ import annotations

from pysteep import dense_state_dict

WEIGHTS = ("0.weight", "4.weight")


def seen_in_forward(net):
    """The weights as each forward pass of their modules finds them."""
    seen = []
    for i in (0, 4):
        net[i].register_forward_hook(lambda module, *_: seen.append(module.weight.detach().clone()))
    return seen


def assert_held(net, seen, masks, before):
    """Masked weights are 0 wherever they can be seen, and the others have moved."""
    assert seen
    assert all(not w[~mask].any() for w, mask in zip(seen, masks * (len(seen) // 2), strict=True))
    state = dense_state_dict(net)
    for name, mask, old in zip(WEIGHTS, masks, before, strict=True):
        assert not state[name][~mask].any()
        assert bool((state[name] != old)[mask & (old != 0)].all())
