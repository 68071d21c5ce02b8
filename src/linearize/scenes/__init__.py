"""The embedded world: scenes, their captions and pictures, the judge that reads them, the teacher that draws them."""
