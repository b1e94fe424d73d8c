"""Blocks: counted, shared, found again, forgotten in order."""

from hypothesis import given, settings, strategies as st

from llama2.infer.blocks import BLOCK, BlockPool, block_hash


def test_a_released_block_is_found_until_its_place_is_needed():
    pool = BlockPool(2)
    first, second = pool.take(), pool.take()
    pool.remember(first, b"a")
    pool.release(first)
    pool.release(second)
    assert pool.find(b"a") == first and pool.n_free == 2
    assert pool.take() == second  # what can be found is taken last
    assert pool.take() == first and pool.find(b"a") is None


def test_the_longest_unused_is_forgotten_first():
    pool = BlockPool(3)
    blocks = [pool.take() for _ in range(3)]
    for block, name in zip(blocks, (b"a", b"b", b"c"), strict=True):
        pool.remember(block, name)
    for block in (blocks[1], blocks[0], blocks[2]):
        pool.release(block)
    pool.share(blocks[1])  # used again
    pool.release(blocks[1])
    pool.take()
    assert [pool.find(name) is None for name in (b"a", b"b", b"c")] == [True, False, False]


def test_a_sequence_lies_in_one_piece_where_it_can():
    pool = BlockPool(16)
    one = [pool.take()]
    other = [pool.take()]
    for _ in range(5):
        one.append(pool.take(one[-1]))
        other.append(pool.take(other[-1]))
    assert one == list(range(one[0], one[0] + 6)) and other == list(range(other[0], other[0] + 6))


def test_a_hash_depends_on_all_that_came_before_and_on_the_adapter():
    tokens = tuple(range(BLOCK))
    names = {
        block_hash(b"", tokens),
        block_hash(b"x", tokens),
        block_hash(b"", tokens, "a"),
        block_hash(b"", tokens[::-1]),
    }
    assert len(names) == 4


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["take", "share", "release", "remember", "find", "grow"]), st.integers(0, 30)))
)
def test_no_block_is_ever_lost_or_held_twice(steps):
    pool, held = BlockPool(4), []
    for step, number in steps:
        if step == "take" and pool.n_free:
            block = pool.take(held[-1] if held and number % 2 else None)
            assert block not in held
            held.append(block)
        elif step == "share" and held:
            held.append(held[number % len(held)])
            pool.share(held[-1])
        elif step == "release" and held:
            pool.release(held.pop(number % len(held)))
        elif step == "remember" and held:
            pool.remember(held[number % len(held)], bytes([number]))
        elif step == "find" and (block := pool.find(bytes([number]))) is not None:
            pool.share(block)
            held.append(block)
        elif step == "grow" and pool.n_blocks < 12:
            pool.grow(1)
        assert pool.n_held == len(set(held))
        assert pool.n_free + pool.n_held == pool.n_blocks
        assert all(pool.refs[block] == held.count(block) for block in range(pool.n_blocks))
