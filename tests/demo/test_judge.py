"""The demo's judge: stories are independent samples, and shares come with their intervals."""

from llama2.data.storyworld.grade import grade
from llama2.data.storyworld.stories import stories
from llama2.demo.judge import percent, tell
from llama2.llm import LLM
from llama2.model.transformer import build
from tests.pocket import POCKET, pocket_tokenizer


def test_every_story_is_drawn_on_its_own():
    llm = LLM(build(POCKET, seed=0), pocket_tokenizer())
    told = tell(llm, "en", 3, seed=2)
    openings = [each.opening("en") for each in stories(0, 3, split="heldout")]
    room = llm.config.context_length - max(len(llm.prompt_ids(opening)) for opening in openings)
    for i, (opening, (text, found)) in enumerate(zip(openings, told, strict=True)):
        alone = llm.generate(opening, max_new_tokens=room, temperature=0.8, top_p=1.0, seed=6 + i)
        assert text == opening + alone
        assert found.is_well_formed == grade(text, "en").is_well_formed
    ends = {text.removeprefix(opening) for opening, (text, _) in zip(openings, told, strict=True)}
    assert len(ends) == 3


def test_a_share_has_its_interval():
    assert percent(9, 10) == "90.0 % (59.6 to 98.2)"
