"""Any image encoder, any language model: trained in both stages, saved, loaded, asked."""

import json
from pathlib import Path

import numpy as np
import others
import pytest
import tiny
import torch
import transformers
from gradio_client import Client, handle_file
from PIL import Image

from blip2 import cli
from blip2.chat import CachePool, Chat
from blip2.checkpoint import load, save
from blip2.generation import Generation, generate
from blip2.language import Manners
from blip2.ui import build, launch
from train import pretrain, recipes
from train.datasets import Scenes
from train.engine import FitConfig
from train.recipes import QFormerConfig

FIT = FitConfig(steps=3, learning_rate=1e-3, warmup_steps=1, precision="fp32", log_every=3)
QFORMER = QFormerConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
    num_query_tokens=4, image_text_hidden_size=16,
)  # fmt: skip
DATA = Scenes(num_scenes=24, num_validation=4)
GREEDY = Generation(max_new_tokens=8)


def trained(stage: int, start_from, output: Path, **changes) -> Path:
    """The model folder of a short run."""
    recipe = recipes.Recipe(
        stage=stage, start_from=str(start_from), data=DATA, batch_size=4, fit=FIT, output=str(output),
        qformer=QFORMER, **changes,
    )  # fmt: skip
    assert pretrain.run(recipe).finished
    return output / "model"


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of encoders and language models, made when asked for."""
    folder = tmp_path_factory.mktemp("parts")

    def part(kind: str, **options) -> Path:
        path = folder / f"{kind}{options or ''}"
        if not path.exists():
            torch.manual_seed(0)
            (others.encoder if kind in ENCODERS else others.language_model)(kind, path, **options)
        return path

    return part


ENCODERS = ("siglip", "dinov2", "clip", "vit", "dinov3")
PAIRS = [("siglip", "qwen"), ("dinov2", "t5")]


@pytest.fixture(scope="module", params=PAIRS, ids=lambda pair: "+".join(pair))
def pair(request, parts, tmp_path_factory):
    """Encoder, language model, and the folders that stage 1 and stage 2 saved."""
    folder = tmp_path_factory.mktemp("runs")
    encoder, language = request.param
    first = trained(1, parts(encoder), folder / "one")
    second = trained(2, first, folder / "two", language_model=str(parts(language)))
    return encoder, language, first, second


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(5).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return str(tmp_path / "picture.png")


# --- both stages, end to end ---


def test_both_stages_keep_what_is_frozen(pair, parts):
    """Saved and loaded, the encoder and the language model are those of their folders; the rest has moved."""
    encoder, language, first, second = pair
    one, two = load(first, device="cpu"), load(second, device="cpu")
    whole = transformers.AutoModel.from_pretrained(parts(encoder))
    tower = getattr(whole, "vision_model", whole).state_dict()
    for loaded in (one, two):
        assert loaded.model.config.model_type == "blip2-any"
        for name, value in loaded.model.vision_model.model.state_dict().items():
            assert torch.equal(value, tower[name]), name
        assert loaded.processor.image_size == 64
        assert loaded.processor.mean == ((0.5,) * 3 if encoder == "siglip" else (0.485, 0.456, 0.406))
    assert not any(name.startswith("head.") for name in two.model.vision_model.model.state_dict())
    unread = {"qwen": transformers.Qwen2ForCausalLM, "t5": transformers.T5ForConditionalGeneration}[language]
    for name, value in unread.from_pretrained(parts(language)).state_dict().items():
        assert torch.equal(two.model.language_model.state_dict()[name], value), name
    assert not torch.equal(one.model.query_tokens, two.model.query_tokens)


def test_command_line_and_app_caption(pair, picture, capsys, tmp_path, monkeypatch):
    first, second = pair[2:]
    loaded = load(second, device="cpu")
    image = loaded.model.encode_image(loaded.processor.images(Image.open(picture)))
    [[caption]] = generate(loaded.model, loaded.processor, image, "a", Generation.caption())
    assert cli.main(["caption", picture, "--model", str(second), "--prompt", "a", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["results"][0]["captions"] == [caption]
    assert cli.main(["ask", picture, "what color is it?", "--model", str(second)]) == 0
    assert cli.main(["match", picture, "a ring", "--model", str(first)]) == 0
    assert cli.main(["explain", picture, "what is it?", "--model", str(second), "--map", "attention",
                     "--out", str(tmp_path / "map.png")]) == 0  # fmt: skip
    assert (tmp_path / "map.png").is_file()
    capsys.readouterr()
    assert cli.main(["info", str(second)]) == 0
    told = capsys.readouterr().out
    assert (
        "transformers' BLIP-2 cannot express this model" in told
        and f"{loaded.model.num_parameters():,}" in told
    )
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    demo = build(local=True, model=str(second))
    try:
        remote = Client(launch(demo), verbose=False)
        assert remote.predict(handle_file(picture), "a", 1, api_name="/caption") == [caption]
        prompt = loaded.processor.prompt("what color is it?", loaded.processor.question_style)
        [[answer]] = generate(loaded.model, loaded.processor, image, prompt, Generation.answer())
        assert remote.predict(handle_file(picture), "what color is it?", api_name="/answer") == answer
    finally:
        demo.close(verbose=False)


def test_transformers_refuses(pair):
    for folder in pair[2:]:
        for theirs in (
            transformers.Blip2ForConditionalGeneration,
            transformers.Blip2ForImageTextRetrieval,
            transformers.AutoModelForImageTextToText,
        ):
            with pytest.raises((OSError, ValueError)):
                theirs.from_pretrained(folder)


@pytest.mark.parametrize("precision", ["bfloat16", "int8", "nf4"])
def test_loads_in_few_bits(pair, precision, tmp_path):
    loaded = load(pair[3], precision=precision, device="cpu")
    pixels = torch.randn(1, 3, 64, 64)
    exact = load(pair[3], precision="float32", device="cpu").model.image_embeds(pixels)
    seen = loaded.model.image_embeds(pixels).float()
    assert (seen - exact).norm() / exact.norm() < 0.25
    again = load(save(loaded.model, loaded.processor, tmp_path / "again"), device="cpu")
    assert again.precision == precision
    for one in (loaded, load(tmp_path / "again", precision=precision, device="cpu")):
        texts = generate(one.model, one.processor, one.model.encode_image(pixels), "a", GREEDY)
        assert texts == generate(
            loaded.model, loaded.processor, loaded.model.encode_image(pixels), "a", GREEDY
        )


@pytest.mark.parametrize("kind", ["clip", "vit", "dinov3"])
def test_other_encoders_survive_a_folder(kind, parts, tmp_path):
    """What is saved and loaded encodes as the library's model does, without its text half and pooler."""
    folder = trained(1, parts(kind), tmp_path)
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        whole = transformers.AutoModel.from_pretrained(parts(kind))
        if kind == "clip":  # the last block is left out
            expected = whole.vision_model(pixels, output_hidden_states=True).hidden_states[-2]
        else:
            expected = whole(pixels).last_hidden_state
        assert torch.equal(load(folder, device="cpu").model.vision_model.encode(pixels), expected)


# --- decoders ---


@pytest.fixture(scope="module")
def eva_stage1(tmp_path_factory):
    """Stage 1 around an encoder that transformers' BLIP-2 can express."""
    folder = tmp_path_factory.mktemp("eva")
    return trained(1, eva(folder / "eva"), folder / "one")


@pytest.fixture(scope="module", params=["qwen", "qwen3", "llama", "mistral"])
def decoder(request, parts, eva_stage1, tmp_path_factory):
    """Stage 2 with a decoder on rotary positions, around an EVA-like encoder; Mistral has a window."""
    language = parts("llama", spare=0) if request.param == "llama" else parts(request.param)
    folder = tmp_path_factory.mktemp("decoder")
    return load(trained(2, eva_stage1, folder, language_model=str(language)), device="cpu")


def eva(folder: Path, **changes) -> Path:
    """An encoder that transformers' BLIP-2 can express."""
    from safetensors.torch import save_file

    from blip2.vision import VisionTransformer

    config = tiny.config("retrieval", vision_config={"image_size": 64, "patch_size": 16} | changes)
    config = config.vision_config
    folder.mkdir()
    config.to_json_file(folder / "config.json")
    save_file(tiny.randomize(VisionTransformer(config)).state_dict(), folder / "model.safetensors")
    return folder


def test_the_model_type_says_who_reads_it(decoder):
    """With a row for <image>, transformers computes the same; without one, it refuses."""
    if decoder.model.config.model_type == "blip2-any":
        assert decoder.model.config.text_config.model_type == "llama"
        with pytest.raises((OSError, ValueError)):
            transformers.Blip2ForConditionalGeneration.from_pretrained(decoder.folder)
        return
    theirs = transformers.Blip2ForConditionalGeneration.from_pretrained(decoder.folder).eval()
    pixels, text = torch.randn(1, 3, 64, 64), decoder.processor.text("a red ring")
    processor = transformers.AutoProcessor.from_pretrained(decoder.folder)
    tokens = processor(images=Image.new("RGB", (64, 64)), text="a red ring", return_tensors="pt")
    with torch.no_grad():
        ours = decoder.model(pixels, **text).logits
        logits = theirs(**{**tokens, "pixel_values": pixels}).logits
    torch.testing.assert_close(logits, ours, atol=1e-4, rtol=1e-4)
    options = {"max_new_tokens": 6, "do_sample": False}
    new = theirs.generate(**{**tokens, "pixel_values": pixels}, **options)[0, tokens["input_ids"].shape[1] :]
    assert new.tolist() == decoder.model.generate(pixels, **text, **options)[0].tolist()


PROMPTS = ["", "a", "a red ring left of a small blue star", "what is there?"]


@pytest.mark.parametrize("method", ["greedy", "beam"])
def test_batched_as_alone(decoder, method):
    """Whatever stands beside it, with padding or without: a row gives the answer it gives alone."""
    generation = Generation(method=method, max_new_tokens=8, min_new_tokens=3)
    model, processor = decoder.model, decoder.processor
    images = model.encode_image(torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
    together = generate(model, processor, images, PROMPTS, generation)
    alone = [generate(model, processor, images[i], PROMPTS[i], generation)[0] for i in range(4)]
    assert together == alone and len({text for [text] in alone}) > 1


def test_padding_does_not_train(decoder):
    """Logits of captions of different lengths, padded on the right, are those of each caption alone."""
    from train.captions import decoder_tokens

    model, words, end = decoder.model, decoder.processor.tokenizer, decoder.processor.end
    images = model.encode_image(torch.randn(2, 3, 64, 64))
    captions = ["a red ring", "a small blue star left of a red ring"]
    with torch.no_grad():
        batch = decoder_tokens(words, captions, end=end)
        together = model(image=images, **batch)
        for row, caption in enumerate(captions):
            alone = model(image=images[row], **decoder_tokens(words, [caption], end=end)).logits[0]
            torch.testing.assert_close(together.logits[row, : len(alone)], alone, atol=1e-4, rtol=1e-4)


def test_a_conversation_keeps_its_cache(decoder):
    """Turns that go on from cached keys and values are the turns without a cache."""
    pixels = torch.randn(1, 3, 64, 64)
    image = decoder.model.encode_image(pixels)
    texts = []
    for pool in (CachePool(), CachePool(max_bytes=0)):
        chat = Chat(decoder.model, decoder.processor, pool=pool)
        chat.set_image(image)
        texts.append([chat.ask(question, GREEDY) for question in ("what is it?", "where?", "a star?")])
        prompts = [turn.prompt for turn in chat.turns]
    assert texts[0] == texts[1]
    kept = chat.processor.tokenizer(prompts[0])["input_ids"]
    assert chat.processor.tokenizer(prompts[1])["input_ids"][: len(kept)] == kept


def test_captions_end_as_the_decoder_ends(decoder):
    """Training appends the token that generation stops at; in front is the decoder's own start, if any."""
    from train.captions import tokenize_for

    processor, text = decoder.processor, decoder.model.config.text_config
    words = processor.tokenizer
    end = "<|im_end|>" if text.model_type.startswith("qwen") else "</s>"
    start = "" if text.model_type.startswith("qwen") else "<s>"
    tokenize = tokenize_for(words, processor.family, 12, end=processor.end)
    tokens = tokenize(["a red ring", "a"], np.random.default_rng(0))
    masks = tokens["attention_mask"].bool()
    rows = [words.decode(row[mask]) for row, mask in zip(tokens["input_ids"], masks, strict=True)]
    assert [row.replace(" ", "") for row in rows] == [f"{start}aredring{end}", f"{start}a{end}"]
    assert (tokens["labels"] == -100).sum() == 2 and processor.end == end
    ends = decoder.model.language_model.generation_config.eos_token_id
    assert (ends[0] if isinstance(ends, list) else ends) == words.convert_tokens_to_ids(end)


def test_questions_stand_in_the_decoders_frame(decoder):
    framed = decoder.processor.prompt("what is it?", history=[("where?", "left")], description="a ring")
    if not decoder.model.config.text_config.model_type.startswith("qwen"):
        assert framed == "a ring. Question: where? Answer: left. Question: what is it? Answer:"
    else:
        assert framed == (
            "<|im_start|>user\na ring. where?<|im_end|>\n<|im_start|>assistant\nleft<|im_end|>\n"
            "<|im_start|>user\nwhat is it?<|im_end|>\n<|im_start|>assistant\n"
        )
    assert decoder.processor.prompt("what?", "short") == "Question: what? Short answer:"
    assert decoder.processor.prompt("a photo of", "caption") == "a photo of"


def test_manners(parts):
    """A base model that carries its siblings' chat template does not chat; unless one says so."""
    model = transformers.AutoModelForCausalLM.from_pretrained(parts("qwen"))
    words = transformers.AutoTokenizer.from_pretrained(parts("qwen"))
    assert Manners.of(model, words) == Manners("<|im_end|>", (2, 0), True)
    assert Manners.of(model, words, "question") == Manners("<|im_end|>", (2, 0), False)
    words.eos_token, model.config.eos_token_id, model.generation_config.eos_token_id = "<|endoftext|>", 0, 0
    assert Manners.of(model, words) == Manners("<|endoftext|>", (0,), False)
    assert Manners.of(model, words, "chat") == Manners("<|im_end|>", (2, 0), True)
    llama = transformers.AutoModelForCausalLM.from_pretrained(parts("llama", spare=0))
    with pytest.raises(ValueError, match="no chat template"):
        Manners.of(llama, others.tokenizer("llama"), "chat")


def test_a_start_token_is_put_once(parts):
    """Chat templates write the start token that the tokenizer puts in front as well."""
    from blip2.processing import Processor

    words = others.tokenizer("llama")
    words.chat_template, words.pad_token = "{{ bos_token }}" + others.CHAT, "</s>"
    processor = Processor(words, family="opt", image_size=64)
    ids = processor.text(processor.prompt("what?"))["input_ids"][0].tolist()
    assert ids.count(words.bos_token_id) == 1 and ids[0] == words.bos_token_id
