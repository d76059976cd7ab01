"""The classes of the public data sets, and the mask value that counts nowhere."""

VOID_LABEL = 255  # mask value of pixels that count neither as hit nor as miss

VOC_CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep "
    "sofa train tvmonitor"
).split()
"""The 20 foreground classes of PASCAL VOC, in the order of its mask values 1 to 20."""

# "|" between the names: twelve of them hold a space.
COCO_CLASSES = tuple(
    (
        "person|bicycle|car|motorcycle|airplane|bus|train|truck|boat|traffic light|fire hydrant|stop sign|"
        "parking meter|bench|bird|cat|dog|horse|sheep|cow|elephant|bear|zebra|giraffe|backpack|umbrella|handbag|"
        "tie|suitcase|frisbee|skis|snowboard|sports ball|kite|baseball bat|baseball glove|skateboard|surfboard|"
        "tennis racket|bottle|wine glass|cup|fork|knife|spoon|bowl|banana|apple|sandwich|orange|broccoli|carrot|"
        "hot dog|pizza|donut|cake|chair|couch|potted plant|bed|dining table|toilet|tv|laptop|mouse|remote|"
        "keyboard|cell phone|microwave|oven|toaster|sink|refrigerator|book|clock|vase|scissors|teddy bear|"
        "hair drier|toothbrush"
    ).split("|")
)
"""The 80 foreground classes of COCO's instances, in the order of its category ids: mask values 1 to 80."""
