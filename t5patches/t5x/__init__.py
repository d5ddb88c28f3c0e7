"""The T5X drop-in: models, trainer, feature converters and the functions of the gin files.

**In a config**: include ``t5patches/configs/finetune.gin`` after T5X's own file, set ``OBJECTIVE``
to a name of the README's table (``ce`` trains on the corrections) and the feature lengths of
``inputs``, ``negative_targets`` and ``corrected_targets``. `feature_converters` compares the two
texts, by position as T5Patches does or aligned (``alignment="tokens"``); with
`NegativeSpansFeatureConverter` and `NegativeSetsFeatureConverter` the task says what to push down.
The original is the model that training began from. A run stores it in its directory as
``original_params``, which ``eval.gin`` and ``infer.gin`` take as ``ORIGINAL_PATH``.

**On a pod** nothing else has to be set: the losses use the mesh of T5X's partitioner.
``partitioning.PjitPartitioner.num_partitions`` is the size of the model axis. With
``NUM_MICROBATCHES`` the original also runs one microbatch at a time. The original's parameters are
an argument of the step and are sharded like the trained ones: they take the same memory again, but
have no optimizer state. `t5patches_kernels.mesh_axes` says what happens to sizes that the mesh does
not divide.

**A teacher cache**: `cache_teacher` runs the original over the data set once and stores its last
hidden states, ``target tokens x width`` numbers. With ``fused_head.gin`` and ``TEACHER_CACHE``
training reads them in every process, in any order and packed. A cache of another checkpoint or data
set is refused.

**Where it differs from T5Patches on purpose**

* `alpha` is what you pass (default 1e4; T5Patches' five targeted models always use 1e4).
* A weight between -1 and 0 lowers the token's probability by that share; below -1 it removes the
  token. (T5Patches: negative probabilities, or tokens dropped without a warning.)
* Where the original is nearly certain of the token to remove, the rest of its distribution is
  renormalized without loss of precision. (T5Patches: wrong from a lead of 76, NaN from 88.) If no
  mass is left at all, the term is 0.
* ``-inf`` logits, and NaN at padding, do not make the loss NaN. Nor does a batch whose tokens are
  all ignored, with a loss normalizing factor that counts tokens or sequences (T5X's own: NaN).
* The `nl` threshold stops the gradient of pushed-down tokens that are unlikely enough, as its
  docstring says, and not that of confident kept tokens. `ul` keeps its gradient where the token to
  push down has nearly all of the probability.
* `z_loss` and the loss normalizing factor have an effect, and label smoothing raises where it has
  no meaning. ``divergence=True`` reports KL(q, p), whose minimum is 0, with the same gradient.
* ``correct`` is also true for a target that ties for the largest logit.
* The original runs without dropout (``teacher_dropout=True`` restores T5Patches' way) and is the
  model that training began from, also after a resume. Microbatches, flax mutables, train-eval and
  scores work. Metrics of kept and of pushed-down tokens are separate. Padding has no weight
  (T5Patches: -2 after a text that the correction continues), and packing works.
"""
