"""From a file of unwanted outputs to an edited model, with no T5X.

The commands of `t5patches` are thin; each step is a function on arrays and files, in the order in
which they are used:

| | |
|---|---|
| `t5patches.model.folder.load_model` | a Hugging Face folder: model, parameters, tokenizer |
| `annotate.speak`, `annotate.expand_negatives`, `rules` | the model's outputs, marked; sets |
| `collect.collect` | all of that from inputs to a file: told, resumed |
| `data.read_examples`, `write_examples`, `to_arrays` | marked outputs in files and in arrays |
| `mixing`, `templates` | several files in one run, instructions around inputs |
| `train.train` | the edit itself, on one device or on `t5patches.model.placement.make_mesh`'s |
| `evaluate.evaluate`, `report` | what it removed and what else it changed |
| `rounds.compare` | folders of edits beside the original's |
| `t5patches.model.huggingface.save_checkpoint`, `t5x_format.save_t5x` | the edited model, saved |
| `edit.edit` | from folder to folder: checked, planned, resumed |
| `policy.align`, `align.align_folder` | towards a score of whole outputs, near the original |
| `reward.train_reward`, `reward_folder.reward_folder` | a model that scores, from preferences |

For example, from a folder to an edited one::

    import pathlib

    from t5patches.editing.annotate import pattern, speak
    from t5patches.editing.data import to_arrays
    from t5patches.editing.evaluate import prevalence
    from t5patches.editing.train import TrainSettings, train
    from t5patches.model.folder import load_model
    from t5patches.model.huggingface import save_checkpoint

    model, params, tokenizer = load_model("model")
    texts = pathlib.Path("inputs.txt").read_text().splitlines()
    rule = pattern("the")  # what is unwanted


    def marked(params):  # sampled outputs of the model, with what is unwanted in them
        options = dict(max_length=6, samples=32, temperature=1.0)
        return speak(model, params, texts, rule, tokenizer, **options)


    before = marked(params)
    settings = TrainSettings(objective="tnrf", steps=40, batch_size=16, learning_rate=3e-2)
    arrays = to_arrays(before, pad_id=model.config.pad_id)
    edited = train(model, params, arrays, settings, pathlib.Path("run")).params
    after = marked(edited)
    save_checkpoint(pathlib.Path("edited"), model, edited, like=pathlib.Path("model"))
    print(*(prevalence(said)["prevalence"].value for said in (before, after)))
"""
