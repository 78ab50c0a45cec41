"""Does it look at objects, does it survive other backgrounds, and what are its features worth?

``weights`` reads encoders of any naming, ``pictures`` the labelled images; ``statistics`` holds the intervals and
``figures`` the sheets that all commands share. The commands: ``grounding`` (Grad-CAM of matching two crops), ``probe``
(k nearest neighbours, linear classification, finetuning), ``downstream`` (Grad-CAM of two classifiers that disagree),
``backgrounds`` and ``backgrounds_make`` (the Backgrounds Challenge, and sets of its kind from any labelled images).
"""
