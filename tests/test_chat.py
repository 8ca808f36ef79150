"""The chat: one encoding a picture, caches that change no answer, stopping, changing one's mind."""

import threading

import pytest
import tiny
from PIL import Image

from blip2.chat import CachePool, Chat
from blip2.generation import Generation, describe, generate
from blip2.processing import Processor, PromptError

LONG = Generation(method="nucleus", top_p=1.0, temperature=3.0, seed=1, max_new_tokens=12, min_new_tokens=12)


@pytest.fixture(params=["opt", "t5"])
def chat(request):
    return make(request.param)


def make(family, pool=None, seed=0):
    processor = Processor(
        tiny.tokenizer(family),
        family=family,
        image_size=tiny.IMAGE_SIZE,
        num_query_tokens=tiny.NUM_QUERIES,
        context=96,
    )
    chat = Chat(tiny.ours(family, seed).eval(), processor, pool=pool or CachePool())
    chat.set_image(Image.new("RGB", (40, 30), "red"))
    return chat


def test_image_is_encoded_once_over_five_turns_a_beam_search_and_an_edit(chat):
    runs = []
    chat.model.vision_model.register_forward_hook(lambda *_: runs.append(1))
    chat.set_image(Image.new("RGB", (40, 30), "blue"))
    for question in ("what color is the circle ?", "how many ?", "what is left of the star ?"):
        "".join(chat.stream(question))
    chat.ask("is there a dog ?")
    "".join(chat.edit(1, "how many red ?"))
    assert len(runs) == 1 and len(chat.turns) == 2


def test_turns_see_the_turns_before(chat):
    first = chat.ask("what color ?", Generation())
    chat.ask("how many ?", Generation())
    assert f"Question: what color ? Answer: {first.rstrip('.')}. Question: how many ?" in chat.turns[1].prompt


def test_pieces_make_the_answer(chat):
    pieces = list(chat.stream("what color ?", LONG))
    assert len(pieces) > 1
    assert "".join(pieces) == chat.turns[0].answer != ""


@pytest.mark.parametrize("max_bytes", [0, 30_000, 1 << 30])
def test_eviction_never_changes_an_answer(max_bytes):
    """Three interleaved chats under one limit answer as three chats that each have a pool of their own."""
    questions = ["what color ?", "how many ?", "is there a cat ?"]
    pool = CachePool(max_bytes)
    shared = [make("opt", pool) for _ in range(3)]
    for question in questions:
        for chat in shared:
            "".join(chat.stream(question, LONG))
            assert pool.num_bytes <= max_bytes
    alone = make("opt")
    for question in questions:
        "".join(alone.stream(question, LONG))
    for chat in shared:
        assert [turn.answer for turn in chat.turns] == [turn.answer for turn in alone.turns]


def test_pool_forgets_chats_that_are_gone():
    pool = CachePool()
    chat = make("opt", pool)
    chat.ask("what color ?", Generation())
    assert pool.num_bytes > 0
    del chat
    assert pool.num_bytes == 0


def test_closing_the_iterator_stops_and_keeps_what_was_said(chat):
    pieces = chat.stream("what color ?", LONG)
    first = next(pieces)
    pieces.close()
    assert chat.turns[0].answer == first and chat.turns[0].num_tokens < 12
    assert chat.ask("how many ?", LONG)  # and it goes on


def test_stop_from_another_thread_ends_within_a_token(chat):
    stopped_at = []
    for _ in chat.stream("what color ?", LONG):
        if not stopped_at:
            stopped_at.append(chat.turns[0].num_tokens)
            thread = threading.Thread(target=chat.stop)
            thread.start()
            thread.join()
    assert chat.turns[0].num_tokens <= stopped_at[0] + 1


def test_one_answer_at_a_time(chat):
    pieces = chat.stream("what color ?", LONG)
    next(pieces)
    with pytest.raises(ValueError, match="still answering"):
        next(chat.stream("how many ?"))
    pieces.close()


def test_undo_edit_regenerate(chat):
    answers = ["".join(chat.stream(q, LONG)) for q in ("what color ?", "how many ?")]
    assert "".join(chat.regenerate(LONG)) == answers[1]
    assert "".join(chat.edit(0, "what color ?", LONG)) == answers[0]
    assert [turn.question for turn in chat.turns] == ["what color ?"]
    assert chat.undo().answer == answers[0]
    assert chat.undo() is None
    with pytest.raises(ValueError, match="no turn 0"):
        chat.edit(0, "how many ?")


def test_a_refused_edit_loses_nothing(chat):
    chat.ask("what color ?", Generation())
    with pytest.raises(PromptError, match="empty"):
        chat.edit(0, "  ")
    assert len(chat.turns) == 1


def test_a_failure_leaves_no_half_turn_and_no_broken_cache(chat):
    expected = "".join(make(chat.processor.family).stream("what color ?", LONG))
    pieces = chat.stream("what color ?", LONG)
    next(pieces)
    hook = chat.model.language_model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(pieces)
    hook.remove()
    assert chat.turns == []
    assert "".join(chat.stream("what color ?", LONG)) == expected


def test_new_picture_new_conversation(chat):
    chat.ask("what color ?", Generation())
    chat.set_image(Image.new("RGB", (9, 9)), keep_turns=True)
    assert len(chat.turns) == 1
    chat.set_image(Image.new("RGB", (9, 9)))
    assert chat.turns == []


def test_oldest_turns_leave_when_the_context_is_full(chat):
    for _ in range(8):
        chat.ask("what color is the circle left of the star ?", LONG)
    assert chat.turns[0].dropped == 0 and chat.turns[-1].dropped > 0
    assert "oldest" in chat.turns[-1].notice and "left out" in chat.turns[-1].notice
    assert chat.turns[-1].prompt.count("Question:") == 8 - chat.turns[-1].dropped


def test_bad_use(chat):
    with pytest.raises(PromptError, match="shorten"):
        chat.ask("red " * 200)
    with pytest.raises(PromptError, match="empty"):
        chat.ask("")
    with pytest.raises(ValueError, match="num_captions"):
        chat.ask("what ?", Generation(method="beam", num_captions=2))
    with pytest.raises(ValueError, match="set_image"):
        Chat(chat.model, chat.processor).ask("what color ?")
    assert chat.turns == []


def test_own_captions_stand_between_picture_and_questions(chat):
    plain = chat.ask("how many ?")
    chat.clear()
    chat.describe = 1
    chat.ask("how many ?")
    chat.ask("what color is it ?")
    [[caption]] = generate(
        chat.model, chat.processor, chat.image, "a photo of", Generation(max_new_tokens=30)
    )
    assert chat.description == caption and caption
    for turn in chat.turns:
        assert turn.prompt.startswith(f"{caption.rstrip('.')}. Question: how many ?")
    chat.set_image(Image.new("RGB", (40, 30), "blue"))
    assert not chat.description
    chat.describe = 0
    chat.set_image(Image.new("RGB", (40, 30), "red"))
    assert chat.ask("how many ?") == plain
    chat.model.config.num_descriptions = 1  # what a checkpoint says is the default
    assert Chat(chat.model, chat.processor).describe == 1
    assert Chat(chat.model, chat.processor, describe=0).describe == 0


def test_descriptions_of_many_captions(chat):
    model, processor = chat.model, chat.processor
    assert describe(model, processor, chat.image, 0) == [""]
    [one] = describe(model, processor, chat.image, 1)
    [many] = describe(model, processor, chat.image, 5)
    assert many.startswith(f"{one.strip().rstrip('.')}. ") and many.count(". ") >= 2
    assert len(processor.tokenizer(many)["input_ids"]) <= processor.context // 2
    assert describe(model, processor, chat.image, 5) == [many]
    for wrong in (-1, 21):
        with pytest.raises(ValueError, match=f"0 to 20 captions, not {wrong}"):
            describe(model, processor, chat.image, wrong)


def test_stop_while_describing(chat):
    chat.describe = 2
    hook = chat.model.language_model.lm_head.register_forward_hook(lambda *_: chat.stop())
    assert list(chat.stream("how many ?", LONG)) == []
    hook.remove()
    assert not chat.description and [turn.answer for turn in chat.turns] == [""]
    assert chat.undo() and chat.ask("how many ?", LONG) and chat.description


def test_the_way_of_answering_may_change_between_turns(chat):
    descriptions = []
    for count in (0, 1, 3, 0):
        chat.describe = count
        chat.ask("how many ?")
        descriptions.append(chat.description)
    none, one, three, again = descriptions
    assert none == again == "" and three.startswith(one) and len(three) > len(one) > 0
    starts = ["Question:", one[:9], one[:9], "Question:"]
    assert [turn.prompt.startswith(start) for turn, start in zip(chat.turns, starts, strict=True)] == [
        True
    ] * 4
