"""What only T5X needs: models, trainer, feature converters, gin files.

**In a config**: ``include "t5patches/configs/finetune.gin"`` after T5X's own, set ``OBJECTIVE`` to
a name of the README's table (``ce`` trains on the corrections) and the feature lengths of
``inputs``, ``negative_targets`` and ``corrected_targets``. `feature_converters` aligns the two
texts (``alignment="tokens"`` or T5Patches' rule); `NegativeSpansFeatureConverter` and
`NegativeSetsFeatureConverter` are told what to push down. The original model is the one that
training began from. It stays in the run's directory as ``original_params``, which ``eval.gin`` and
``infer.gin`` take as ``ORIGINAL_PATH``.

**On a pod** there is nothing more to set: T5X's partitioner puts the mesh where the losses find it.
``partitioning.PjitPartitioner.num_partitions`` is the size of the model axis; with
``NUM_MICROBATCHES`` the original runs a microbatch at a time too. The original's parameters are an
argument of the step, split like those being trained: that much memory once more, without an
optimizer's share. `t5patches_kernels.mesh_axes` says what happens to sizes that do not divide.

**The original computed once**: `cache_teacher` runs it over the data set and stores its last hidden
states; with ``fused_head.gin`` and ``TEACHER_CACHE`` the training reads them, packed and in any
order, in every process. A cache holds ``target tokens x width`` numbers and is refused for another
checkpoint, tokenizer or data set.

**What differs from T5Patches, on purpose**

* `alpha` is what you pass (default 1e4; T5Patches' five targeted models always use 1e4).
* A weight between -1 and 0 lowers the token's probability by that share; below -1 it removes it.
  (T5Patches: negative probabilities, or tokens dropped silently.)
* Where the original is sure of the token, the rest keeps all its digits. (T5Patches: wrong from a
  lead of 76, NaN from 88.) If nothing is left at all, the term is 0.
* ``-inf`` logits, and NaN at padding, are safe.
* The `nl` threshold stops tokens that are unlikely enough, as its docstring says, and not confident
  kept ones. `ul` keeps its gradient where the model is most wrong.
* `z_loss` and the loss normalising factor work, and label smoothing raises where it could not;
  ``divergence=True`` reports KL(q, p), which reaches 0, with the same gradient.
* ``correct`` counts a target that ties for the largest logit as correct.
* The original runs without dropout (``teacher_dropout=True`` for T5Patches' way), and is the one
  that training began from after a resume too. Microbatches, flax mutables, train-eval and scores
  work; metrics count kept and pushed-down tokens apart. Padding never has a weight (T5Patches: -2
  after a text that the correction continues), and packing works.
"""
