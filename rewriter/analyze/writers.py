"""Functions and methods that write files or logs."""

from __future__ import annotations

WRITERS = {
    "json.dump", "pickle.dump", "numpy.save", "numpy.savez", "numpy.savetxt", "matplotlib.pyplot.savefig", "os.remove",
    "os.rename", "os.replace", "os.mkdir", "os.symlink", "os.unlink", "shutil.copy", "shutil.copyfile", "shutil.rmtree",
    "shutil.move", "shutil.copytree", "yaml.dump", "torchvision.utils.save_image", "wandb.log", "wandb.save",
    "wandb.finish", "wandb.watch", "wandb.init", "mlflow.log_metric", "mlflow.log_metrics", "wandb.config.update",
}  # fmt: skip
WRITING_METHODS = {
    "add_scalar", "add_scalars", "add_histogram", "add_image", "add_images", "add_text", "add_graph", "add_hparams",
    "savefig", "to_csv", "write_text", "write_bytes", "writerow", "writerows", "save_pretrained",
}  # fmt: skip
