def brightness(images, prompts):
    return images.mean(dim=(1, 2, 3))


def contrast(images, prompts):
    return images.flatten(1).std(1)
