# ruff: noqa: E501 - scripts are read more easily on one line
"""Training scripts the way people write them. Each defines ``losses`` (or prints them) and leaves a ``model``.

``DATA_PARALLEL`` ones are started on two ranks in both forms; the others alone, and converted on two.
"""

HEAD = """import argparse, copy, json, math, os, random, time
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc = nn.Linear(dim, dim)

    def forward(self, x):
        return x + torch.tanh(self.fc(self.norm(x)))


class Net(nn.Module):
    def __init__(self, dim=8, depth=2, classes=3):
        super().__init__()
        self.blocks = nn.ModuleList([Block(dim) for _ in range(depth)])
        self.head = nn.Linear(dim, classes)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def make_data(n, seed):
    g = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, 8, generator=g), torch.randint(0, 3, (n,), generator=g))


"""

ALONE = {
    "argparse, main, validation, best checkpoint": """
def train(args, model, device, train_loader, optimizer, epoch):
    model.train()
    for batch_idx, (data, target) in enumerate(train_loader):
        data, target = data.to(device), target.to(device)
        optimizer.zero_grad()
        output = model(data)
        loss = F.cross_entropy(output, target)
        loss.backward()
        optimizer.step()
        if batch_idx % args.log_interval == 0:
            print('Train Epoch: {} Loss: {:.6f}'.format(epoch, loss.item()))


def test(model, device, test_loader):
    model.eval()
    test_loss = 0
    correct = 0
    with torch.no_grad():
        for data, target in test_loader:
            data, target = data.to(device), target.to(device)
            output = model(data)
            test_loss += F.cross_entropy(output, target, reduction='sum').item()  # sum up batch loss
            pred = output.argmax(dim=1, keepdim=True)
            correct += pred.eq(target.view_as(pred)).sum().item()
    test_loss /= len(test_loader.dataset)
    print('Test set: Average loss: {:.4f}, Accuracy: {}/{}'.format(test_loss, correct, len(test_loader.dataset)))
    return correct / len(test_loader.dataset)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--epochs', type=int, default=2)
    parser.add_argument('--lr', type=float, default=0.1)
    parser.add_argument('--log-interval', type=int, default=1)
    args = parser.parse_args([])
    torch.manual_seed(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train_loader = DataLoader(make_data(16, 0), batch_size=4, shuffle=True)
    test_loader = DataLoader(make_data(8, 1), batch_size=8)
    global model
    model = Net().to(device)
    optimizer = torch.optim.Adadelta(model.parameters(), lr=args.lr)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)
    best = 0
    for epoch in range(1, args.epochs + 1):
        train(args, model, device, train_loader, optimizer, epoch)
        acc = test(model, device, test_loader)
        scheduler.step()
        if acc >= best:
            best = acc
            torch.save({'epoch': epoch, 'state_dict': model.state_dict(), 'best': best}, 'best.pt')
    print(json.dumps({'lr': optimizer.param_groups[0]['lr'], 'best': best}))


if __name__ == '__main__':
    main()
""",
    "trainer class with early stopping": """
class Trainer:
    def __init__(self, model, train_loader, val_loader, lr=1e-2, patience=1, device='cpu'):
        self.model = model.to(device)
        self.train_loader, self.val_loader = train_loader, val_loader
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr)
        self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(self.optimizer, patience=0, factor=0.5)
        self.criterion = nn.CrossEntropyLoss()
        self.best_loss, self.patience, self.bad = float('inf'), patience, 0
        self.device = device

    def _step(self, batch):
        x, y = (t.to(self.device) for t in batch)
        return self.criterion(self.model(x), y)

    def train_epoch(self):
        self.model.train()
        total = 0.0
        for batch in self.train_loader:
            self.optimizer.zero_grad(set_to_none=True)
            loss = self._step(batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm=0.5)
            self.optimizer.step()
            total += loss.item()
        return total / len(self.train_loader)

    @torch.no_grad()
    def validate(self):
        self.model.eval()
        losses = [self._step(batch).item() for batch in self.val_loader]
        return sum(losses) / len(losses)

    def save(self, path):
        torch.save(self.model.state_dict(), path)

    def fit(self, epochs):
        for epoch in range(epochs):
            train_loss, val_loss = self.train_epoch(), self.validate()
            self.scheduler.step(val_loss)
            print(f'epoch {epoch} train {train_loss:.5f} val {val_loss:.5f} lr {self.optimizer.param_groups[0]["lr"]:.6f}')
            if val_loss < self.best_loss:
                self.best_loss, self.bad = val_loss, 0
                self.save('best.pt')
            else:
                self.bad += 1
                if self.bad > self.patience:
                    print('early stop')
                    break


if __name__ == "__main__":
    torch.manual_seed(42)
    trainer = Trainer(Net(), DataLoader(make_data(16, 0), batch_size=8, shuffle=True), DataLoader(make_data(8, 1), batch_size=4))
    trainer.fit(4)
    model = trainer.model
""",
    "accumulation with a schedule and groups": """
def get_cosine_schedule_with_warmup(optimizer, num_warmup_steps, num_training_steps):
    def lr_lambda(step):
        if step < num_warmup_steps:
            return step / max(1, num_warmup_steps)
        progress = (step - num_warmup_steps) / max(1, num_training_steps - num_warmup_steps)
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda)


def train(model, loader, optimizer, scheduler, accum=2, max_grad_norm=1.0):
    model.train()
    optimizer.zero_grad()
    running = 0.0
    for step, (x, y) in enumerate(loader):
        loss = F.cross_entropy(model(x), y) / accum
        loss.backward()
        running += loss.item()
        if (step + 1) % accum == 0 or step + 1 == len(loader):
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            print(f'{running:.5f} {scheduler.get_last_lr()[0]:.6f}')
            running = 0.0


torch.manual_seed(0)
model = Net()
no_decay = ['bias', 'norm.weight']
groups = [
    {'params': [p for n, p in model.named_parameters() if not any(nd in n for nd in no_decay)], 'weight_decay': 0.1},
    {'params': [p for n, p in model.named_parameters() if any(nd in n for nd in no_decay)], 'weight_decay': 0.0},
]
optimizer = torch.optim.AdamW(groups, lr=1e-2, eps=1e-8)
loader = DataLoader(make_data(20, 0), batch_size=4, shuffle=True)
scheduler = get_cosine_schedule_with_warmup(optimizer, 1, 6)
for epoch in range(2):
    train(model, loader, optimizer, scheduler)
""",
    "mixed precision": """
from torch.cuda.amp import GradScaler, autocast

torch.manual_seed(3)
model = Net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
scaler = GradScaler()
criterion = nn.CrossEntropyLoss()
loader = DataLoader(make_data(16, 0), batch_size=8)
for epoch in range(3):
    for x, y in loader:
        optimizer.zero_grad()
        with autocast():
            loss = criterion(model(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        print('loss %.5f norm %.4f' % (loss.item(), norm))
torch.save({'model': model.state_dict(), 'optimizer': optimizer.state_dict()}, 'last.pt')
""",
    "phases": """
def train_model(model, dataloaders, dataset_sizes, criterion, optimizer, scheduler, num_epochs=2):
    since = time.time()
    best_model_wts = copy.deepcopy(model.state_dict())
    best_acc = 0.0
    for epoch in range(num_epochs):
        for phase in ['train', 'val']:
            if phase == 'train':
                model.train()
            else:
                model.eval()
            running_loss = 0.0
            running_corrects = 0
            for inputs, labels in dataloaders[phase]:
                optimizer.zero_grad()
                with torch.set_grad_enabled(phase == 'train'):
                    outputs = model(inputs)
                    _, preds = torch.max(outputs, 1)
                    loss = criterion(outputs, labels)
                    if phase == 'train':
                        loss.backward()
                        optimizer.step()
                running_loss += loss.item() * inputs.size(0)
                running_corrects += torch.sum(preds == labels.data)
            if phase == 'train':
                scheduler.step()
            if phase == 'val' and running_corrects >= best_acc:
                best_acc = running_corrects
                best_model_wts = copy.deepcopy(model.state_dict())
    model.load_state_dict(best_model_wts)
    return model


torch.manual_seed(0)
model_ft = Net(classes=5)
num_ftrs = model_ft.head.in_features
model_ft.head = nn.Linear(num_ftrs, 3)
dataloaders = {x: DataLoader(make_data(16, i), batch_size=4, shuffle=True) for i, x in enumerate(['train', 'val'])}
dataset_sizes = {x: len(dataloaders[x].dataset) for x in ['train', 'val']}
optimizer_ft = torch.optim.SGD(model_ft.parameters(), lr=0.05, momentum=0.9)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer_ft, step_size=1, gamma=0.1)
model = train_model(model_ft, dataloaders, dataset_sizes, nn.CrossEntropyLoss(), optimizer_ft, scheduler)
""",
    "stop and resume": """
def save_checkpoint(state, filename='checkpoint.pth.tar'):
    torch.save(state, filename)


def run(resume, epochs):
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    start_epoch = 0
    if resume and os.path.isfile(resume):
        print("=> loading checkpoint '{}'".format(resume))
        checkpoint = torch.load(resume, map_location='cpu')
        start_epoch = checkpoint['epoch']
        model.load_state_dict(checkpoint['state_dict'])
        optimizer.load_state_dict(checkpoint['optimizer'])
        scheduler.load_state_dict(checkpoint['scheduler'])
    loader = DataLoader(make_data(12, 0), batch_size=4)
    for epoch in range(start_epoch, epochs):
        for x, y in loader:
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
        print(epoch, round(float(loss), 5))
        save_checkpoint({
            'epoch': epoch + 1,
            'state_dict': model.state_dict(),
            'optimizer': optimizer.state_dict(),
            'scheduler': scheduler.state_dict(),
        })
    return model


if __name__ == '__main__':
    run(None, 2)
    model = run('checkpoint.pth.tar', 4)
""",
    "averages in a class": """
class EMA:
    def __init__(self, model, decay):
        self.model = model
        self.decay = decay
        self.shadow = {}
        self.backup = {}

    def register(self):
        for name, param in self.model.named_parameters():
            if param.requires_grad:
                self.shadow[name] = param.data.clone()

    def update(self):
        for name, param in self.model.named_parameters():
            if param.requires_grad:
                assert name in self.shadow
                new_average = (1.0 - self.decay) * param.data + self.decay * self.shadow[name]
                self.shadow[name] = new_average.clone()

    def apply_shadow(self):
        for name, param in self.model.named_parameters():
            if param.requires_grad:
                self.backup[name] = param.data
                param.data = self.shadow[name]

    def restore(self):
        for name, param in self.model.named_parameters():
            if param.requires_grad:
                param.data = self.backup[name]
        self.backup = {}


torch.manual_seed(0)
model = Net()
ema = EMA(model, 0.9)
ema.register()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for x, y in DataLoader(make_data(16, 0), batch_size=4):
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    ema.update()
ema.apply_shadow()
with torch.no_grad():
    print('%.5f' % F.cross_entropy(model(torch.ones(4, 8)), torch.tensor([0, 1, 2, 0])).item())
ema.restore()
""",
    "averages of a copy": """
@torch.no_grad()
def update_ema(ema_model, model, decay=0.9):
    for ema_p, p in zip(ema_model.parameters(), model.parameters()):
        ema_p.data.mul_(decay).add_(p.data, alpha=1 - decay)
    for ema_b, b in zip(ema_model.buffers(), model.buffers()):
        ema_b.copy_(b)


torch.manual_seed(0)
net = Net()
ema_model = copy.deepcopy(net).eval().requires_grad_(False)
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, betas=(0.9, 0.95))
for x, y in DataLoader(make_data(16, 0), batch_size=4):
    loss = F.cross_entropy(net(x), y) + 0.1 * F.mse_loss(net(x), ema_model(x))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    update_ema(ema_model, net)
model = ema_model
""",
    "two networks": """
def weights_init(m):
    classname = m.__class__.__name__
    if classname.find('Linear') != -1:
        nn.init.normal_(m.weight.data, 0.0, 0.2)
        nn.init.constant_(m.bias.data, 0)


torch.manual_seed(999)
netG = Net(classes=8)
netG.apply(weights_init)
netD = Net(classes=1)
netD.apply(weights_init)
criterion = nn.BCEWithLogitsLoss()
optimizerD = torch.optim.Adam(netD.parameters(), lr=0.01, betas=(0.5, 0.999))
optimizerG = torch.optim.Adam(netG.parameters(), lr=0.01, betas=(0.5, 0.999))
dataloader = DataLoader(make_data(16, 0), batch_size=8, shuffle=True)
fixed = torch.linspace(-1, 1, 128).view(16, 8)
for epoch in range(2):
    for i, data in enumerate(dataloader, 0):
        netD.zero_grad()
        real = data[0]
        b_size = real.size(0)
        label = torch.full((b_size,), 1.0)
        errD_real = criterion(netD(real).view(-1), label)
        errD_real.backward()
        fake = netG(real.flip(0) * 0.5)
        label.fill_(0.0)
        errD_fake = criterion(netD(fake.detach()).view(-1), label)
        errD_fake.backward()
        errD = errD_real + errD_fake
        optimizerD.step()
        netG.zero_grad()
        label.fill_(1.0)
        errG = criterion(netD(fake).view(-1), label)
        errG.backward()
        optimizerG.step()
        print('Loss_D: %.4f Loss_G: %.4f' % (errD.item(), errG.item()))
model = netG
""",
    "hand-set learning rates": """
max_lr, min_lr, warmup, max_steps = 1e-2, 1e-3, 2, 8


def get_lr(it):
    if it < warmup:
        return max_lr * (it + 1) / warmup
    ratio = (it - warmup) / (max_steps - warmup)
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (max_lr - min_lr)


torch.manual_seed(1337)
model = Net()
params = {n: p for n, p in model.named_parameters() if p.requires_grad}
decay = [p for p in params.values() if p.dim() >= 2]
nodecay = [p for p in params.values() if p.dim() < 2]
print(f'decayed {len(decay)}, with {sum(p.numel() for p in decay):,} parameters')
optimizer = torch.optim.AdamW([{'params': decay, 'weight_decay': 0.1}, {'params': nodecay, 'weight_decay': 0.0}], lr=max_lr, betas=(0.9, 0.95), fused=False)
data = make_data(64, 0)
batch_size = 8


def get_batch():
    ix = torch.randint(64, (batch_size,))
    return torch.stack([data[i][0] for i in ix]), torch.stack([data[i][1] for i in ix])


for step in range(max_steps):
    lr = get_lr(step)
    for param_group in optimizer.param_groups:
        param_group['lr'] = lr
    optimizer.zero_grad(set_to_none=True)
    for micro_step in range(2):
        xb, yb = get_batch()
        loss = F.cross_entropy(model(xb), yb) / 2
        loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if step % 2 == 0:
        print(f"step {step:4d} | loss: {loss.item() * 2:.5f} | lr {lr:.4e} | norm: {norm:.4f}")
""",
    "norms of gradients and weights": """
torch.manual_seed(0)
model = Net()
for p in model.parameters():
    if p.dim() > 1:
        nn.init.xavier_uniform_(p)
optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-2)
for x, y in DataLoader(make_data(8, 0), batch_size=4):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    total_norm = 0.0
    for p in model.parameters():
        if p.grad is not None:
            param_norm = p.grad.data.norm(2)
            total_norm += param_norm.item() ** 2
    total_norm = total_norm ** 0.5
    grads = [p.grad.detach().flatten() for p in model.parameters() if p.grad is not None]
    print('grad norm %.5f %.5f' % (total_norm, torch.cat(grads).norm()))
    optimizer.step()
    with torch.no_grad():
        weight_norm = sum(p.norm() ** 2 for p in model.parameters()) ** 0.5
    print('weight norm %.5f' % weight_norm)
    for p in model.parameters():
        p.data.clamp_(-0.5, 0.5)
""",
    "a penalty on weights": """
torch.manual_seed(0)
model = Net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
lambda_l2 = 0.01
for x, y in DataLoader(make_data(16, 0), batch_size=4):
    loss = F.cross_entropy(model(x), y)
    l2 = sum(p.pow(2).sum() for p in model.parameters())
    l1 = 0
    for name, param in model.named_parameters():
        if 'weight' in name:
            l1 = l1 + param.abs().sum()
    loss = loss + lambda_l2 * l2 + 1e-3 * l1
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print('%.5f' % loss.item())
""",
    "teacher, freezing, losses in a dict": """
torch.manual_seed(0)
teacher = Net()
for p in teacher.parameters():
    p.requires_grad = False
teacher.eval()
model = Net()
model.load_state_dict(teacher.state_dict())
with torch.no_grad():
    for p in model.head.parameters():
        p.add_(0.1)
for param in model.blocks[0].parameters():
    param.requires_grad_(False)
optimizer = torch.optim.AdamW(filter(lambda p: p.requires_grad, model.parameters()), lr=1e-2)
weights = {'ce': 1.0, 'kd': 0.5}
for epoch in range(2):
    for x, y in DataLoader(make_data(8, 0), batch_size=4):
        with torch.no_grad():
            target = teacher(x).softmax(-1)
        out = model(x)
        losses = {'ce': F.cross_entropy(out, y), 'kd': F.kl_div(out.log_softmax(-1), target, reduction='batchmean')}
        loss = sum(weights[k] * v for k, v in losses.items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print('loss: %.4f' % loss)
""",
    "DataParallel and its module": """
torch.manual_seed(0)
model = Net()
device = torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')
if torch.cuda.device_count() > 1:
    model = nn.DataParallel(model)
model.to(device)
optimizer = torch.optim.Adagrad(model.parameters(), lr=0.05)
for i, (inputs, labels) in enumerate(DataLoader(make_data(12, 0), batch_size=4)):
    inputs, labels = inputs.to(device), labels.to(device)
    optimizer.zero_grad()
    outputs = model(inputs)
    loss = nn.CrossEntropyLoss()(outputs, labels)
    loss.backward()
    optimizer.step()
    if i % 2 == 0:
        model_to_save = model.module if hasattr(model, 'module') else model
        torch.save(model_to_save.state_dict(), os.path.join('.', 'step_{}.pth'.format(i)))
""",
    "an iterable dataset and a generator": """
class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        rng = random.Random(5)
        for _ in range(16):
            yield torch.tensor([rng.random() for _ in range(8)]), rng.randrange(3)


def cycle(dl):
    while True:
        for batch in dl:
            yield batch


torch.manual_seed(0)
np.random.seed(0)
model = Net()
opt = torch.optim.Adam(model.parameters(), 1e-2)
dl = cycle(DataLoader(Stream(), batch_size=4))
step = 0
while step < 6:
    x, y = next(dl)
    loss = F.cross_entropy(model(x), y)
    opt.zero_grad(); loss.backward(); opt.step()
    step += 1
    if not step % 3: print(step, f'{loss:.5f}')
""",
    "gradient penalty": """
torch.manual_seed(0)
critic = Net(classes=1)
model = Net(classes=8)
opt_c = torch.optim.Adam(critic.parameters(), lr=1e-2, betas=(0.0, 0.9))
opt_g = torch.optim.Adam(model.parameters(), lr=1e-2, betas=(0.0, 0.9))


def gradient_penalty(critic, real, fake):
    mixed = (0.3 * real + 0.7 * fake).requires_grad_(True)
    out = critic(mixed)
    grads = torch.autograd.grad(outputs=out, inputs=mixed, grad_outputs=torch.ones_like(out), create_graph=True, retain_graph=True)[0]
    return ((grads.norm(2, dim=1) - 1) ** 2).mean()


for step, (real, _) in enumerate(DataLoader(make_data(24, 0), batch_size=4)):
    fake = model(real.roll(1, 1)).detach()
    loss_c = critic(fake).mean() - critic(real).mean() + 10 * gradient_penalty(critic, real, fake)
    opt_c.zero_grad()
    loss_c.backward()
    opt_c.step()
    if step % 2 == 1:
        loss_g = -critic(model(real.roll(1, 1))).mean()
        opt_g.zero_grad()
        loss_g.backward()
        opt_g.step()
        print('%.5f' % loss_g.item())
""",
    "logs of every kind": """
import csv
from tqdm import tqdm


class AverageMeter:
    def __init__(self):
        self.sum = self.count = 0

    def update(self, val, n=1):
        self.sum += val * n
        self.count += n

    @property
    def avg(self):
        return self.sum / self.count


def train(loader, model, optimizer, scaler=None):
    meter = AverageMeter()
    pbar = tqdm(loader, disable=None)
    for batch in pbar:
        batch = {'x': batch[0], 'y': batch[1]}
        with torch.autocast('cpu', enabled=False):
            loss = F.cross_entropy(model(batch['x']), batch['y'])
        optimizer.zero_grad()
        if scaler is not None:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        else:
            loss.backward()
            optimizer.step()
        meter.update(loss.item(), 4)
        pbar.set_postfix(loss=loss.item())
    return meter.avg


cfg = {'optimizer': 'AdamW', 'lr': 1e-2}
torch.manual_seed(0)
model = Net()
optimizer = getattr(torch.optim, cfg['optimizer'])(model.parameters(), lr=cfg['lr'])
history = []
os.makedirs('runs', exist_ok=True)
for epoch in range(2):
    avg = train(DataLoader(make_data(8, 0), batch_size=4), model, optimizer)
    history.append(avg)
    with open('log.csv', 'a', newline='') as f:
        csv.writer(f).writerow([epoch, avg])
    print(f'epoch {epoch}: {avg:.5f}')
np.save('history.npy', np.array(history))
if min(history) == history[-1]:
    torch.save(model.state_dict(), 'runs/best.pt')
print(open('log.csv').read() if os.path.exists('log.csv') else '')
""",
    "carried state and pretrained vectors": """
class RNN(nn.Module):
    def __init__(self, vocab, dim):
        super().__init__()
        self.emb = nn.Embedding(vocab, dim)
        self.rnn = nn.LSTM(dim, dim, num_layers=2, batch_first=True)
        self.out = nn.Linear(dim, vocab)

    def forward(self, x, hidden=None):
        x, hidden = self.rnn(self.emb(x), hidden)
        return self.out(x), hidden


def repackage_hidden(h):
    return h.detach() if isinstance(h, torch.Tensor) else tuple(repackage_hidden(v) for v in h)


torch.manual_seed(0)
model = RNN(11, 8)
model.emb.weight.data.copy_(torch.linspace(-1, 1, 88).view(11, 8))
torch.nn.init.zeros_(model.out.bias)
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
text = torch.randint(0, 11, (4, 40))
hidden = None
for i in range(0, 32, 8):
    data, target = text[:, i:i + 8], text[:, i + 1:i + 9]
    output, hidden = model(data, hidden)
    hidden = repackage_hidden(hidden)
    loss = nn.CrossEntropyLoss()(output.reshape(-1, 11), target.reshape(-1))
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
    optimizer.step()
    print('| loss {:5.4f} | ppl {:8.3f}'.format(loss.item(), math.exp(loss.item())))
""",
    "averaging by torch, compiled": """
from torch.optim.swa_utils import AveragedModel, SWALR

torch.manual_seed(0)
net = Net()
net = torch.compile(net, backend='eager')
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
for epoch in range(3):
    for x, y in DataLoader(make_data(8, epoch), batch_size=4):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
    scheduler.step()
    print(f'{epoch} {loss.item():.5f} {scheduler.get_last_lr()[0]:.5f}')
model = net._orig_mod
""",
    "unfrozen on the way": """
torch.manual_seed(0)
model = Net()
for p in model.blocks.parameters():
    p.requires_grad = False
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for epoch in range(4):
    if epoch == 2:
        for p in model.blocks.parameters():
            p.requires_grad = True
        optimizer.add_param_group({'params': [], 'lr': 1e-3}) if False else None
        for g in optimizer.param_groups:
            g['lr'] *= 0.1
    for x, y in DataLoader(make_data(8, 0), batch_size=4):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print('%d %.5f %d' % (epoch, loss.item(), sum(p.numel() for p in model.parameters() if p.requires_grad)))
""",
    "a model's own training step": """
class Task(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Net()
        self.temperature = nn.Parameter(torch.ones(()))
        self.register_buffer('steps', torch.zeros((), dtype=torch.long))

    def forward(self, x):
        return self.net(x) / self.temperature

    def training_step(self, batch):
        x, y = batch
        self.steps += 1
        loss = F.cross_entropy(self(x), y)
        return {'loss': loss, 'logits': self.net(x).detach()}

    def configure_optimizers(self, lr):
        return torch.optim.AdamW(self.parameters(), lr=lr, weight_decay=0.0)


def fit(task, loader, lr=1e-2, max_norm=1.0, epochs=2):
    optimizer = task.configure_optimizers(lr)
    for epoch in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            out = task.training_step(batch)
            out['loss'].backward()
            nn.utils.clip_grad_norm_(task.parameters(), max_norm)
            optimizer.step()
            print(round(out['loss'].item(), 4))
    return task


torch.manual_seed(0)
model = fit(Task(), DataLoader(make_data(8, 0), batch_size=4, shuffle=True))
""",
}

DATA_PARALLEL = {
    "launched by torchrun": """
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data.distributed import DistributedSampler


def setup():
    dist.init_process_group("nccl")
    local_rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(local_rank)
    return local_rank


def main():
    local_rank = setup()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    global model
    model = Net().cuda(local_rank)
    model = DDP(model, device_ids=[local_rank])
    dataset = make_data(24, 0)
    sampler = DistributedSampler(dataset, shuffle=True)
    loader = DataLoader(dataset, batch_size=4, sampler=sampler)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        total = torch.zeros(1)
        for i, (x, y) in enumerate(loader):
            x, y = x.cuda(non_blocking=True), y.cuda(non_blocking=True)
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        dist.all_reduce(total, op=dist.ReduceOp.SUM)
        if rank == 0:
            print('epoch %d loss %.5f' % (epoch, total.item() / world_size / len(loader)))
            torch.save(model.module.state_dict(), 'model_%d.pt' % epoch)
        dist.barrier()
    model = model.module
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
""",
    "accumulation, no_sync, evaluation on rank 0": """
import contextlib
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group(backend='nccl')
rank = dist.get_rank()
is_master = rank == 0
torch.manual_seed(7)
model = Net()
ddp_model = DistributedDataParallel(model)
optimizer = torch.optim.SGD(ddp_model.parameters(), lr=0.1, momentum=0.9)
data = make_data(32, rank)
accum = 2


def evaluate(m):
    m.eval()
    with torch.no_grad():
        out = m(torch.ones(4, 8))
    m.train()
    return out.mean().item()


for step in range(4):
    for micro in range(accum):
        x, y = data[step * 8 + micro * 4: step * 8 + micro * 4 + 4]
        context = ddp_model.no_sync() if micro < accum - 1 else contextlib.nullcontext()
        with context:
            loss = F.cross_entropy(ddp_model(x), y) / accum
            loss.backward()
    torch.nn.utils.clip_grad_norm_(ddp_model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if step % 2 == 0 and is_master:
        print('eval %.5f' % evaluate(ddp_model.module))
        torch.save({'model': ddp_model.module.state_dict(), 'step': step}, 'ckpt.pt')
dist.barrier()
""",
    "averaged losses by the script": """
import torch.distributed as dist


def reduce_mean(tensor, nprocs):
    rt = tensor.clone()
    dist.all_reduce(rt, op=dist.ReduceOp.SUM)
    rt /= nprocs
    return rt


def is_main_process():
    return dist.get_rank() == 0


def train_one_epoch(model, criterion, data_loader, optimizer, epoch):
    model.train()
    for it, (x, y) in enumerate(data_loader):
        loss = criterion(model(x), y)
        if not math.isfinite(loss.item()):
            raise SystemExit(1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        reduced = reduce_mean(loss, dist.get_world_size())
        if is_main_process():
            print('%d %.5f' % (it, reduced.item()))


dist.init_process_group('gloo', init_method='env://')
seed = 5 + dist.get_rank()
torch.manual_seed(5)
model = Net()
model = torch.nn.parallel.DistributedDataParallel(model)
torch.manual_seed(seed)
dataset = make_data(16, 0)
sampler_train = torch.utils.data.DistributedSampler(dataset, num_replicas=dist.get_world_size(), rank=dist.get_rank(), shuffle=False)
batch_sampler_train = torch.utils.data.BatchSampler(sampler_train, 4, drop_last=True)
data_loader_train = DataLoader(dataset, batch_sampler=batch_sampler_train)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for epoch in range(2):
    sampler_train.set_epoch(epoch)
    train_one_epoch(model, nn.CrossEntropyLoss(), data_loader_train, optimizer, epoch)
    if is_main_process():
        torch.save({'model': model.module.state_dict(), 'epoch': epoch}, f'checkpoint{epoch}.pth')
model = model.module
""",
}
