"""From a file of unwanted outputs to an edited model, with no T5X.

The commands of `t5patches` are thin; each step is a function on arrays and files, in the order in
which they are used:

| | |
|---|---|
| `model.load_model` | a Hugging Face folder: sizes, parameters, tokenizer |
| `annotate.speak`, `annotate.expand_negatives`, `rules` | the model's outputs, marked; sets |
| `collect.collect` | all of that from inputs to a file: told, resumed |
| `data.read_examples`, `write_examples`, `to_arrays` | marked outputs in files and in arrays |
| `mixing`, `templates` | several files in one run, instructions around inputs |
| `train.train` | the edit itself, on one device or on `devices.make_mesh`'s |
| `evaluate.evaluate`, `report` | what it removed and what else it changed |
| `rounds.compare` | folders of edits beside the original's |
| `checkpoint.save_checkpoint`, `t5x_checkpoint.save_t5x` | the edited model, for either library |
| `edit.edit` | from folder to folder: checked, planned, resumed |
"""
