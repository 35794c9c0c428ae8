import time
def test_it(tiny_base, write_recipe, tmp_path):
    import finetune.runner as R
    r = write_recipe(tmp_path)
    print(r.read_text())
    t=time.time()
    run = R.run(r, runs=tmp_path/"runs", quiet=True)
    print(time.time()-t, run.test["metrics"], run.folder.load_status())
    for m in ("full",):
        run = R.run(write_recipe(tmp_path/"f", adapter={"method":"full"}, train={"epochs":4}), runs=tmp_path/"runs2", quiet=True)
        print(time.time()-t, run.test["metrics"], run.folder.load_status())
