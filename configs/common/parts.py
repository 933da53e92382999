"""What configs of several data sets do with the parts of Detectron2's models."""


def box_parts(roi_heads, name):
    """The box heads or box predictors, ``name``, of each stage of a Cascade R-CNN, or the one."""
    return roi_heads[f"{name}s"] if f"{name}s" in roi_heads else [roi_heads[name]]


def without_masks(model):
    """From a Mask R-CNN to a Faster R-CNN."""
    for key in ("mask_in_features", "mask_pooler", "mask_head"):
        model.roi_heads.pop(key)
    return model
