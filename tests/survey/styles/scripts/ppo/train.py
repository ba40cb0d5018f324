import numpy as np
import torch
import torch.nn as nn
import torch.optim as optim
from torch.distributions.categorical import Categorical


def layer_init(layer, std=np.sqrt(2), bias_const=0.0):
    torch.nn.init.orthogonal_(layer.weight, std)
    torch.nn.init.constant_(layer.bias, bias_const)
    return layer


class Agent(nn.Module):
    def __init__(self):
        super().__init__()
        self.critic = nn.Sequential(layer_init(nn.Linear(4, 16)), nn.Tanh(), layer_init(nn.Linear(16, 1), std=1.0))
        self.actor = nn.Sequential(layer_init(nn.Linear(4, 16)), nn.Tanh(), layer_init(nn.Linear(16, 2), std=0.01))

    def get_value(self, x):
        return self.critic(x)

    def get_action_and_value(self, x, action=None):
        probs = Categorical(logits=self.actor(x))
        if action is None:
            action = probs.sample()
        return action, probs.log_prob(action), probs.entropy(), self.critic(x)


if __name__ == "__main__":
    np.random.seed(1); torch.manual_seed(1)
    agent = Agent()
    optimizer = optim.Adam(agent.parameters(), lr=2.5e-3, eps=1e-5)
    num_steps, num_envs, mb = 8, 4, 8
    bsz = num_steps * num_envs
    rng = np.random.RandomState(0)
    nxt = torch.tensor(rng.randn(num_envs, 4), dtype=torch.float32)
    for update in range(1, 4):
        frac = 1.0 - (update - 1.0) / 3
        optimizer.param_groups[0]["lr"] = frac * 2.5e-3
        obs, actions = torch.zeros(num_steps, num_envs, 4), torch.zeros(num_steps, num_envs)
        logprobs, rewards, values = (torch.zeros(num_steps, num_envs) for _ in range(3))
        for step in range(num_steps):
            obs[step] = nxt
            with torch.no_grad():
                a, lp, _, v = agent.get_action_and_value(nxt)
                values[step] = v.flatten()
            actions[step], logprobs[step] = a, lp
            rewards[step] = ((nxt[:, 0] > 0) == (a == 1)).float()
            nxt = torch.tensor(rng.randn(num_envs, 4), dtype=torch.float32)
        adv = rewards - values
        returns = adv + values
        b_obs, b_lp, b_a = obs.reshape(-1, 4), logprobs.reshape(-1), actions.reshape(-1)
        b_adv, b_ret = adv.reshape(-1), returns.reshape(-1)
        b_inds = np.arange(bsz)
        clipfracs = []
        for epoch in range(2):
            np.random.shuffle(b_inds)
            for start in range(0, bsz, mb):
                mi = b_inds[start:start + mb]
                _, newlp, ent, newv = agent.get_action_and_value(b_obs[mi], b_a.long()[mi])
                logratio = newlp - b_lp[mi]
                ratio = logratio.exp()
                with torch.no_grad():
                    kl = ((ratio - 1) - logratio).mean()
                    clipfracs += [((ratio - 1.0).abs() > 0.2).float().mean().item()]
                mb_adv = b_adv[mi]
                mb_adv = (mb_adv - mb_adv.mean()) / (mb_adv.std() + 1e-8)
                pg = torch.max(-mb_adv * ratio, -mb_adv * torch.clamp(ratio, 0.8, 1.2)).mean()
                vl = 0.5 * ((newv.view(-1) - b_ret[mi]) ** 2).mean()
                loss = pg - 0.01 * ent.mean() + vl * 0.5
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
                optimizer.step()
        y_pred, y_true = values.reshape(-1).numpy(), b_ret.numpy()
        ev = 1 - np.var(y_true - y_pred) / np.var(y_true)
        print(update, f"v {vl.item():.4f} pg {pg.item():.4f} kl {kl.item():.5f} clip {np.mean(clipfracs):.3f} ev {ev:.4f}")
    torch.save(agent.state_dict(), "agent.pt")
