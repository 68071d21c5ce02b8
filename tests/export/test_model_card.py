"""What the model card of a student says."""

from linearize.model_card import model_card


def test_the_model_card_says_how_to_load_and_which_mixers(folders):
    for form, line in (("local", "load_pipeline"), ("standalone", "trust_remote_code=True")):
        card = (folders[form] / "README.md").read_text()
        assert line in card
        assert "`clear(window=2" in card and "in 3 layers" in card
        assert card.startswith("---\nlibrary_name: diffusers\n")


def test_the_model_card_has_the_numbers_of_the_summary(student):
    accuracy = {"value": 0.5, "interval": [0.25, 0.75], "n": 8}
    numbers = {
        "scene_accuracy": accuracy,
        "caption_log_probability": -1.5,
        "psnr_to_teacher": 20.25,
        "velocity_error": 0.125,
        "frechet_distance": None,
    }
    facts = {
        "attention_flops_ratio": 0.375,
        "trainable_parameters": 1234,
        "train_seconds": 60.5,
        "samples_per_second": 2.5,
    }
    summary = {**dict.fromkeys(("teacher", "untrained", "student"), numbers), **facts}
    card = model_card(student.transformer, "FluxPipeline", form="local", summary=summary)
    for number in ("50.0 % [25.0, 75.0] n=8", "-1.5", "20.25", "0.125", "0.375", "1,234", "60.5", "2.5"):
        assert f"| {number} |" in card
