"""The recipe of the reference study: ResNet-34 fine-tuned on 200x200 crops, 954 per class.

python launch.py --config configs/default.py --config.data.root=FOLDER

Every key is here, with what it may be. The other configs change a few of them, and any can be
changed on the command line: `--config.train.num_epochs=10`.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference


def get_config() -> ConfigDict:
    config = ConfigDict()
    # Seed of everything random: crops, split, initialisation, order, augmentation.
    config.seed = 0
    # "imagenet", "random", a .safetensors file, or the workdir of an earlier run.
    config.init = "imagenet"
    # First convolution: "adapt" the kernels of `init` to images of other than 3 channels (averaged
    # and rescaled), or "fresh": at random, whatever the images.
    config.init_conv1 = "adapt"

    config.model = ConfigDict()
    # resnet or plain (the same without shortcuts), followed by 18, 34, 50, 101 or 152; or preact
    # (identity mappings), followed by one of these, 200, 164 or 1001.
    config.model.name = "resnet34"
    # Precision of the computation, "float32" or "bfloat16"; parameters stay float32.
    config.model.dtype = "float32"
    # Channels of the first convolution; ImageNet weights need 64.
    config.model.width = 64
    # Start every residual block as the identity (with init="random").
    config.model.zero_init_residual = False

    config.data = ConfigDict()
    # "folder": images under data.root. "sample": the built-in simulation. "tfds:NAME": a set that
    # TensorFlow Datasets has prepared. "": what data.root or data.sheet names, else the sample.
    config.data.source = ""
    # Folder with one sub-folder per class (and below it, one per channel), or the TFDS data folder.
    config.data.root = ""
    # In place of a folder, a .csv or .tsv file with the columns path (relative to the file), class,
    # and any of channel, group (what stays in one split, with split_by="field") and split.
    config.data.sheet = ""
    # Seed of the crops and the split; -1 is the seed above. Set it to repeat a training with other
    # seeds on the same crops.
    config.data.seed = -1
    # Side of a crop in pixels; 0 uses every image whole.
    config.data.crop_size = 200
    # "all": as many as lie side by side in the images, or as data.mask has cells; a class with more
    # images then has more crops.
    config.data.crops_per_class = FieldReference(954, field_type=object)
    # Crops per class for train, val and test; the sum is crops_per_class. With "all", their ratio.
    config.data.split = (754, 100, 100)
    # What stays in one split: "field"; "channel" (of the device, no colour); a regular expression
    # whose group 1 names the group in an image's path (plate, patient, day, or the field of several
    # stains); or "crop": nothing, as in the study.
    config.data.split_by = "field"
    # What batches images were taken in (plate, day): a regular expression whose group 1 names it in
    # an image's path. Classes that do not stand in all of them are warned of, and
    # cross-validation leaves out one batch after another, too. "": not known.
    config.data.batch_by = ""
    # One fold of a cross-validation as a run of its own: "2/5" tests the second of five folds of
    # what is not in the test split, "2/0" leaves out the second group, "2/batch" the second batch;
    # with " all" behind it no test split is set aside.
    config.data.fold = ""
    # Share of the training images of every class to train on, at least one; a smaller share is a
    # part of a larger one.
    config.data.fraction = 1.0
    # Pixels to leave out at the top, right, bottom and left of every image (burnt-in scale bars).
    config.data.border = (0, 0, 0, 0)
    # Redraw crops with less than this fraction of foreground; 0 keeps all.
    config.data.min_foreground = 0.0
    # Files to leave out: a regular expression that is searched in the path below data.root, such as
    # "_mask" for segmentations that lie beside their images.
    config.data.exclude = ""
    # Ending of segmentations that lie beside their images, such as "_mask" for f0.png and
    # f0_mask.tif: every crop is then centred on a cell, one each; a field gives no more crops than
    # it has cells. "": crops at random places.
    config.data.mask = ""
    # Which plane of a stack to read, such as "T=0" or "Z=3,T=0"; "Z=max" or "Z=mean" project it.
    config.data.plane = ""
    # "imagenet" (8-bit), "percentile" (0.5 and 99.5 % of the training crops), or "auto".
    config.data.normalize = "auto"
    # Random flips and quarter turns of every training crop.
    config.data.augment = ConfigDict()
    config.data.augment.dihedral = False
    # Random gain and offset of every training crop, as a fraction of the normalised range.
    config.data.augment.intensity = 0.0

    config.optim = ConfigDict()
    config.optim.learning_rate = 0.001
    config.optim.momentum = 0.9
    config.optim.weight_decay = 0.0
    # "constant" or "cosine" (to zero at the last step).
    config.optim.schedule = "constant"
    config.optim.label_smoothing = 0.0
    # Regular expressions over the beginning of parameters' names, such as layer1_0/conv1/kernel:
    # what they match stays as it is, norms' statistics too. "(?!fc)" is all but the head.
    config.optim.freeze = ()
    # Freeze for so many epochs, then train everything; 0 freezes for the whole run.
    config.optim.freeze_epochs = 0
    # Factors of the learning rate by the same means, such as "fc=10"; the first match counts.
    config.optim.multipliers = ()
    # "none", or "balanced": every class weighs the same, however many crops it has.
    config.optim.class_weights = "none"

    config.train = ConfigDict()
    # Over all devices.
    config.train.batch_size = 32
    config.train.num_epochs = 50

    config.checkpoint = ConfigDict()
    # Save within an epoch too, every so many steps; 0 saves at the end of each epoch.
    config.checkpoint.every_steps = 0
    return config
